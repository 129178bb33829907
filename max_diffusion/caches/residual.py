"""Caches that run the first blocks and know what the others add."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from max.driver import Buffer

from ..buffers import num_bytes
from ..calls import Routine
from .base import AbstractCacheState, Run

Signal = Literal["residual", "modulated_input"]
"""What is compared between steps: what the front blocks added to the image stream; or
the normed and modulated input of the first block."""


class TailMemory(Protocol):
    """What is known of what blocks add, of every sample."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed yet."""

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held now."""

    def push(self, value: Buffer, step: int, rows: Sequence[int] | None = None) -> None:
        """Takes in ``(B, S, D)``, or of ``rows`` only; kept, uncopied."""

    def forecast(self, step: int) -> Routine[Buffer]:
        """``(B, S, D)`` at a step that does not compute it."""

    def clear(self) -> None:
        """Forgets everything."""


@dataclass
class ResidualState(AbstractCacheState):
    """What the blocks added when last computed, and counts, of every sample."""

    tail: TailMemory
    """What the blocks in the middle added to the image stream, ``(B, S_img, D)``."""
    text_tail: TailMemory | None = None
    """The same of the text stream, ``(B, S_txt, D)``, if blocks follow that read it."""
    reference: Buffer | None = None
    """The signal to compare with, ``(B, S, D)``."""
    plan: frozenset[int] = frozenset()
    """Steps to reuse, of policies that know them beforehand."""
    consecutive: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Reused steps in a row, per sample ``(B,)``."""
    reused: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Reused steps so far, per sample ``(B,)``."""
    accumulated: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """Changes of the reused steps since the last computed one, added up, ``(B,)``."""

    def restart(self, batch: int) -> None:
        """Forgets what was computed; totals of a request of the same batch go on."""
        self.reference = None
        self.tail.clear()
        if self.text_tail is not None:
            self.text_tail.clear()
        self.consecutive = np.zeros(batch, np.int64)
        self.accumulated = np.zeros(batch, np.float32)
        if len(self.reused) != batch:
            self.reused = np.zeros(batch, np.int64)

    def count(self, decision: np.ndarray, change: np.ndarray) -> None:
        """Notes a step's decision, bool ``(B,)``, and what it rested on."""
        self.consecutive = np.where(decision, 0, self.consecutive + 1)
        self.reused = self.reused + ~decision
        self.accumulated = np.where(decision, 0, self.accumulated + change)

    @property
    def num_bytes(self) -> int:
        """Bytes of the reference and all residuals."""
        total = 0 if self.reference is None else num_bytes(self.reference)
        text = 0 if self.text_tail is None else self.text_tail.num_bytes
        return total + self.tail.num_bytes + text


class AbstractResidualCache(ABC):
    """Runs the front blocks, and the middle ones only where it has to."""

    front_blocks: int = 0
    """Blocks at the start that always run."""
    back_blocks: int = 0
    """Blocks at the end that always run."""
    signal: Signal | None = None
    """What decisions rest on; ``None`` where the step index decides."""
    compares_neighbours: bool = False
    """Whether the signal is compared with the step before; or with the last computed
    one, so that slow drift adds up."""

    @abstractmethod
    def create_state(self, run: Run) -> ResidualState:
        """Fresh state of one guidance branch."""

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Steps that may reuse, whatever the samples are like."""
        return run.later_steps

    @abstractmethod
    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """Which samples to compute: bool ``(B,)``. Changes nothing.

        Args:
            state: Has a history; without one the executor computes unasked.
            step: 0-based step index.
            change: float32 ``(B,)``: ``mean|now - reference| / mean|reference|`` of
                the signal over tokens and channels of each sample; 0 without a signal.
                May hold inf or NaN: those samples compute.
        """

    def measure(self, change: np.ndarray) -> np.ndarray:
        """What of a change adds up over reused steps, ``(B,)``."""
        return change
