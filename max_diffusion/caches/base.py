"""What a denoising cache is: a policy on the host with state that belongs to a request.

Two kinds. A *step cache* forecasts the prediction of the steps it does not compute. A
*residual cache* looks at how far the first blocks' output has moved before it decides
whether to run the rest. The executor (``max_diffusion.denoising``) asks for the kind,
never for the name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from max.driver import Buffer

from ..buffers import num_bytes
from .history import History

GraphGroup = Literal["full", "split", "series"]
"""Graphs that come and go together: the whole transformer; its front, back and reuse;
the forecasts."""


@dataclass
class AbstractCacheState(ABC):
    """What one request's guidance branch remembers between steps."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of device memory held now."""


class AbstractStepCache(ABC):
    """Decides before anything of the step is computed."""

    @abstractmethod
    def create_state(self) -> AbstractCacheState:
        """Fresh state of one guidance branch."""

    @abstractmethod
    def decide(self, state: AbstractCacheState, step: int, batch: int) -> np.ndarray:
        """Which samples need the transformer: bool ``(B,)``. Changes nothing.

        All of them where there is no history.
        """

    @abstractmethod
    def forecast(self, state: AbstractCacheState, step: int) -> Buffer:
        """The prediction ``(B, S_img, C)`` of a step that is not computed."""

    @abstractmethod
    def remember(
        self,
        state: AbstractCacheState,
        noise_pred: Buffer,
        step: int,
        rows: Sequence[int] | None = None,
    ) -> np.ndarray | None:
        """Takes in the prediction of a computed step.

        Args:
            state: Changed in place.
            noise_pred: ``(B, S_img, C)``, or of ``rows`` only; kept, uncopied.
            step: 0-based step index.
            rows: Samples that were computed; ``None`` for all.

        Returns:
            What the next decision rests on, one a computed sample, if on anything.
        """


@dataclass
class ResidualState(AbstractCacheState):
    """Residuals of the last computed steps of every sample."""

    tail: History
    """What the blocks after the front added to the image stream, ``(B, S_img, D)``."""
    front_residual: Buffer | None = None
    """What the front blocks added when last computed, ``(B, S_img, D)``."""
    consecutive: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Reused steps in a row, per sample ``(B,)``."""
    reused: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Reused steps so far, per sample ``(B,)``."""
    accumulated: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """Changes of the reused steps since the last computed one, added up, ``(B,)``."""

    def restart(self, batch: int) -> None:
        """Counts of a new history; totals of a request of the same batch go on."""
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
        """Bytes of all residuals."""
        front = 0 if self.front_residual is None else num_bytes(self.front_residual)
        return front + self.tail.num_bytes


class AbstractResidualCache(ABC):
    """Decides from the relative change of the front blocks' residual."""

    residual_threshold: float
    """For a ``run_transformer`` that decides in a graph of its own."""
    warmup_steps: int
    """Steps at the start that such a one must compute."""

    @abstractmethod
    def create_state(self) -> ResidualState:
        """Fresh state of one guidance branch."""

    @abstractmethod
    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """Which samples to compute: bool ``(B,)``.

        Args:
            state: Has a history; without one the executor computes unasked.
            step: 0-based step index.
            change: float32 ``(B,)``, may hold inf or NaN: those samples compute.
        """
