"""Caches that run every block and know what some of its modules give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from max.driver import Buffer

from graphs.denoiser import ModuleLevel

from ..calls import Routine
from .base import AbstractCacheState, Run


class ModuleMemory(Protocol):
    """What is known of one module's output."""

    def push(self, value: Buffer, step: int) -> object:
        """Takes in a computed output ``(B, S, D)``; kept, uncopied."""

    def forecast(self, step: int) -> Routine[Buffer]:
        """The output at a step that does not compute it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held now."""


class GuidanceEstimate(Protocol):
    """What is known of the unconditional branch, from the conditional one."""

    steps: frozenset[int]
    """Steps that estimate."""

    def remember(self, conditional: Buffer, unconditional: Buffer) -> None:
        """Takes in the predictions ``(B, S_img, C)`` of a step that computed both."""

    def estimate(self, conditional: Buffer, step: int) -> Routine[Buffer]:
        """The unconditional prediction ``(B, S_img, C)``."""

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held now."""


@dataclass
class ModuleState(AbstractCacheState):
    """One memory a module output, in the order of the blocks."""

    plan: frozenset[int] = frozenset()
    """Steps to reuse, of policies that know them beforehand."""
    keeps_outputs: bool = True
    """Whether later steps use them; without, every step computes."""
    memories: dict[tuple[int, int], ModuleMemory] = field(default_factory=dict)
    """By block and place among its outputs."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed yet."""
        return not self.memories

    @property
    def num_bytes(self) -> int:
        """Bytes of all outputs kept."""
        return sum(memory.num_bytes for memory in self.memories.values())


class AbstractModuleCache(ABC):
    """Decides by the step index alone, for all samples alike."""

    level: ModuleLevel

    @abstractmethod
    def create_state(self, run: Run) -> ModuleState:
        """Fresh state of one guidance branch."""

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Steps that may reuse something, of either guidance branch."""
        return run.later_steps

    @abstractmethod
    def create_memory(self) -> ModuleMemory:
        """Of one module output."""

    @abstractmethod
    def decide(self, state: ModuleState, step: int) -> bool:
        """Whether a step with a history computes its modules. Changes nothing."""

    def create_guidance(self, run: Run) -> GuidanceEstimate | None:
        """What estimates the unconditional branch at some steps, if anything."""
        return None

    def remember(
        self, state: ModuleState, block: int, values: Sequence[Buffer], step: int
    ) -> None:
        """Takes in what the modules of a block gave."""
        if not state.keeps_outputs:
            return
        for place, value in enumerate(values):
            key = (block, place)
            if key not in state.memories:
                state.memories[key] = self.create_memory()
            state.memories[key].push(value, step)

    def forecast(
        self, state: ModuleState, block: int, step: int
    ) -> Routine[list[Buffer]]:
        """What the modules of a block would give."""
        values = []
        for (index, _), memory in state.memories.items():
            if index == block:
                values.append((yield from memory.forecast(step)))
        return values
