"""Caches that run the first blocks and know what the others add."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from max.driver import Buffer

from ...core.buffers import num_bytes, put_rows, take_rows, with_rows
from ...execution.graph_call import Routine
from ..actions import Action
from ..history import relative_error, weighted_sum
from .base import (
    AbstractCache,
    AbstractCacheState,
    Hidden,
    Inputs,
    Run,
    SplitTransformer,
    latents_shape,
)

if TYPE_CHECKING:
    from .state import DenoisingCacheState

Signal = Literal["residual", "modulated_input"]
"""What is compared between steps: what the front blocks added to the image stream, or
the normed and modulated input of the first block."""


class TailMemory(Protocol):
    """Remembers what blocks add to a stream, for every sample."""

    @property
    def is_empty(self) -> bool:
        """Whether no value was computed yet."""

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that the kept values take."""

    def push(self, value: Buffer, step: int, rows: Sequence[int] | None = None) -> None:
        """Takes in ``(B, S, D)``, or only ``rows`` of it; keeps it without a copy."""

    def forecast(self, step: int) -> Routine[Buffer]:
        """Returns the value ``(B, S, D)`` at a step that does not compute it."""

    def clear(self) -> None:
        """Forgets all values."""


@dataclass
class ResidualState(AbstractCacheState):
    """What the blocks added when last computed, and each sample's counts."""

    tail: TailMemory
    """Memory of what the middle blocks added to the image stream, ``(B, S_img, D)``."""
    text_tail: TailMemory | None = None
    """Memory of what the middle blocks added to the text stream, ``(B, S_txt, D)``;
    ``None`` if no blocks follow that read it."""
    reference: Buffer | None = None
    """The earlier signal to compare with, ``(B, S, D)``; ``None`` before the first."""
    plan: frozenset[int] = frozenset()
    """0-based steps to reuse, of policies that know them beforehand."""
    consecutive: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Number of reused steps in a row, one per sample, int64 ``(B,)``."""
    reused: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Number of reused steps so far, one per sample, int64 ``(B,)``."""
    accumulated: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """Sum of the changes of the steps reused since the last computed one, one per
    sample, ``(B,)``."""

    def restart(self, batch: int) -> None:
        """Forgets what was computed; ``reused`` goes on unless the batch changes."""
        self.reference = None
        self.tail.clear()
        if self.text_tail is not None:
            self.text_tail.clear()
        self.consecutive = np.zeros(batch, np.int64)
        self.accumulated = np.zeros(batch, np.float32)
        if len(self.reused) != batch:
            self.reused = np.zeros(batch, np.int64)

    def count(self, decision: np.ndarray, change: np.ndarray) -> None:
        """Counts a step's decision, bool ``(B,)``, and the change it rested on."""
        self.consecutive = np.where(decision, 0, self.consecutive + 1)
        self.reused = self.reused + ~decision
        self.accumulated = np.where(decision, 0, self.accumulated + change)

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that the reference and all residuals take."""
        total = 0 if self.reference is None else num_bytes(self.reference)
        text = 0 if self.text_tail is None else self.text_tail.num_bytes
        return total + self.tail.num_bytes + text


class AbstractResidualCache(AbstractCache):
    """Base of caches that run the front blocks, and others only where needed."""

    front_blocks: int = 0
    """Number of blocks at the start that always run."""
    back_blocks: int = 0
    """Number of blocks at the end that always run."""
    signal: Signal | None = None
    """What decisions rest on; ``None`` where the step index decides."""
    compares_neighbours: bool = False
    """Whether the signal is compared with that of the step before; if not, with that of
    the last computed step, so that slow drift adds up."""

    @abstractmethod
    def create_state(self, run: Run) -> ResidualState:
        """Creates the fresh state of one guidance branch."""

    @abstractmethod
    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """Returns which samples to compute, bool ``(B,)``; changes nothing.

        Args:
            state: Has a history; without one the executor computes unasked.
            step: 0-based step index.
            change: float32 ``(B,)``: ``mean|now - reference| / mean|reference|`` of
                the signal over tokens and channels of each sample; 0 without a signal.
                May hold inf or NaN: those samples compute.
        """

    def measure(self, change: np.ndarray) -> np.ndarray:
        """Returns how much each change adds to the sum over reused steps, ``(B,)``."""
        return change

    @property
    def num_always_run(self) -> int:
        """Number of front and back blocks together."""
        return self.front_blocks + self.back_blocks

    def run_step(
        self,
        memory: DenoisingCacheState,
        step: int,
        transformer: SplitTransformer,
        inputs: Inputs,
    ) -> Routine[Buffer]:
        """Runs the front blocks, then the middle ones of the samples that need it."""
        state = memory.state
        assert isinstance(state, ResidualState)
        batch, _ = latents_shape(inputs)
        if memory.changes_to(inputs):
            state.restart(batch)
        start = yield from transformer.embed(inputs)
        front = yield from transformer.run_blocks(start, 0, self.front_blocks)
        now = yield from self._signal(transformer, start, front)
        decision, change = np.ones(batch, bool), np.zeros(batch, np.float32)
        memory.signal = None
        if now is not None and state.reference is not None:
            change = yield from relative_error(now, state.reference)
            memory.signal = tuple(float(x) for x in change)
        if not state.tail.is_empty and step not in memory.required_steps:
            decision = self.decide(state, step, change)
        memory.actions = tuple(
            Action.COMPUTE if flag else Action.REUSE for flag in decision
        )
        state.count(decision, self.measure(change))
        self._remember_signal(state, now, decision)
        stop = transformer.num_blocks - self.back_blocks
        if decision.all():
            middle = yield from self._compute(state, step, transformer, front, stop)
        else:
            middle = yield from _reused(state, step, front)
            rows = [int(row) for row in np.flatnonzero(decision)]
            if rows:
                part = transformer.rows_of_hidden(front, rows)
                part = yield from self._compute(
                    state, step, transformer, part, stop, rows
                )
                put_rows(middle.image, rows, part.image)
                if state.text_tail is not None:
                    put_rows(middle.text, rows, part.text)
        last = yield from transformer.run_blocks(middle, stop, transformer.num_blocks)
        return (yield from transformer.output(last))

    def _signal(
        self, transformer: SplitTransformer, start: Hidden, front: Hidden
    ) -> Routine[Buffer | None]:
        if self.signal == "residual":
            return (yield from _difference(front.image, start.image))
        if self.signal == "modulated_input":
            return (yield from transformer.modulated_input(start))
        return None

    def _remember_signal(
        self, state: ResidualState, now: Buffer | None, decision: np.ndarray
    ) -> None:
        """Keeps the signal that the next step's is compared with."""
        if now is None:
            return
        rows = [int(row) for row in np.flatnonzero(decision)]
        if self.compares_neighbours or decision.all():
            state.reference = now
        elif rows:
            assert state.reference is not None
            state.reference = with_rows(state.reference, rows, take_rows(now, rows))

    def _compute(
        self,
        state: ResidualState,
        step: int,
        transformer: SplitTransformer,
        front: Hidden,
        stop: int,
        rows: Sequence[int] | None = None,
    ) -> Routine[Hidden]:
        """Runs the middle blocks, of some samples or all; keeps what they added."""
        middle = yield from transformer.run_blocks(front, self.front_blocks, stop)
        tail = yield from _difference(middle.image, front.image)
        state.tail.push(tail, step, rows)
        if state.text_tail is not None:
            tail = yield from _difference(middle.text, front.text)
            state.text_tail.push(tail, step, rows)
        return middle


def _reused(state: ResidualState, step: int, front: Hidden) -> Routine[Hidden]:
    """Returns what the middle blocks would give, in buffers of its own."""
    tail = yield from state.tail.forecast(step)
    image, text = (yield from weighted_sum([[1, 1]], [front.image, tail])), front.text
    if state.text_tail is not None:
        tail = yield from state.text_tail.forecast(step)
        text = yield from weighted_sum([[1, 1]], [front.text, tail])
    return replace(front, image=image, text=text)


def _difference(after: Buffer, before: Buffer) -> Routine[Buffer]:
    return weighted_sum([[1, -1]], [after, before])
