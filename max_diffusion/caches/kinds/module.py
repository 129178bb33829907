"""Caches that run every block and know what some of its modules give."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from max.driver import Buffer

from graphs.denoiser import ModuleLevel

from ...execution.graph_call import Routine
from ..actions import Action
from .base import (
    AbstractCache,
    AbstractCacheState,
    Inputs,
    Run,
    SplitTransformer,
    latents_shape,
)

if TYPE_CHECKING:
    from .state import DenoisingCacheState


class ModuleMemory(Protocol):
    """Remembers one module's outputs and forecasts them."""

    def push(self, value: Buffer, step: int) -> object:
        """Takes in a computed output ``(B, S, D)``; keeps it without a copy."""

    def forecast(self, step: int) -> Routine[Buffer]:
        """Returns the output ``(B, S, D)`` at a step that does not compute it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that the kept outputs take."""


@dataclass
class ModuleState(AbstractCacheState):
    """One memory per module output."""

    plan: frozenset[int] = frozenset()
    """0-based steps to reuse, of policies that know them beforehand."""
    keeps_outputs: bool = True
    """Whether outputs are kept for later steps; if not, every step computes."""
    memories: list[ModuleMemory] = field(default_factory=list)
    """The memories, in the order of the blocks."""

    @property
    def is_empty(self) -> bool:
        """Whether no output was computed yet."""
        return not self.memories

    def restart(self, batch: int) -> None:
        """Forgets all module outputs."""
        self.memories.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that all kept outputs take."""
        return sum(memory.num_bytes for memory in self.memories)


class AbstractModuleCache(AbstractCache):
    """Base of caches that decide by the step alone, for all samples alike."""

    level: ModuleLevel
    """Which modules' outputs are remembered."""

    @abstractmethod
    def create_state(self, run: Run) -> ModuleState:
        """Creates the fresh state of one guidance branch."""

    @abstractmethod
    def create_memory(self) -> ModuleMemory:
        """Creates the memory of one module output."""

    @abstractmethod
    def decide(self, state: ModuleState, step: int) -> bool:
        """Returns whether a step with a history computes its modules.

        Changes nothing.
        """

    def remember(self, state: ModuleState, values: Sequence[Buffer], step: int) -> None:
        """Takes in the outputs of all modules."""
        if not state.keeps_outputs:
            return
        if not state.memories:
            state.memories = [self.create_memory() for _ in values]
        for memory, value in zip(state.memories, values, strict=True):
            memory.push(value, step)

    def forecast(self, state: ModuleState, step: int) -> Routine[list[Buffer]]:
        """Returns forecasts of the outputs of all modules."""
        values = []
        for memory in state.memories:
            values.append((yield from memory.forecast(step)))
        return values

    def run_step(
        self,
        memory: DenoisingCacheState,
        step: int,
        transformer: SplitTransformer,
        inputs: Inputs,
    ) -> Routine[Buffer]:
        """Runs all blocks, with their modules or with forecasts of their outputs."""
        state = memory.state
        assert isinstance(state, ModuleState)
        batch, _ = latents_shape(inputs)
        if memory.changes_to(inputs):
            state.restart(batch)
        is_required = state.is_empty or step in memory.required_steps
        computes = is_required or self.decide(state, step)
        memory.actions = (Action.COMPUTE if computes else Action.PARTIAL,) * batch
        memory.signal = None
        if computes:
            prediction, values = yield from transformer.run_and_take(inputs, self.level)
            self.remember(state, values, step)
            return prediction
        values = yield from self.forecast(state, step)
        return (yield from transformer.run_given(inputs, self.level, values))
