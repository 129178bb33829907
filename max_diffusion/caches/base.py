"""What a denoising cache is: a policy on the host with state that belongs to a request.

Two kinds. A *step cache* knows from the step index alone whether to compute, and
otherwise forecasts the prediction. A *residual cache* looks at how far the first
blocks' output has moved before it decides whether to run the rest. The executor
(``max_diffusion.denoising``) asks for the kind, never for the name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from max.driver import Buffer

GraphGroup = Literal["full", "split", "taylorseer"]
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
    """Decides from the step index."""

    @abstractmethod
    def create_step_state(self) -> AbstractCacheState:
        """Fresh state of one guidance branch."""

    @abstractmethod
    def should_compute(self, state: AbstractCacheState, step: int) -> bool:
        """Whether ``step`` needs the transformer. Changes nothing."""

    @abstractmethod
    def forecast(self, state: AbstractCacheState, step: int) -> Buffer:
        """The prediction ``(B, S_img, C)`` of a step that is not computed."""

    @abstractmethod
    def remember(
        self, state: AbstractCacheState, noise_pred: Buffer, step: int
    ) -> None:
        """Takes in the prediction of a computed step; keeps the buffer, uncopied."""


@dataclass
class ResidualState(AbstractCacheState):
    """Residuals of the last computed step of every sample."""

    front_residual: Buffer | None = None
    """What the front blocks added to the image stream, ``(B, S_img, D)``."""
    tail_residual: Buffer | None = None
    """What the other blocks added, ``(B, S_img, D)``."""
    consecutive: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Reused steps in a row, per sample ``(B,)``."""

    @property
    def num_bytes(self) -> int:
        """Bytes of both residuals."""
        held = (self.front_residual, self.tail_residual)
        return sum(b.num_elements * b.element_size for b in held if b is not None)


class AbstractResidualCache(ABC):
    """Decides from the relative change of the front blocks' residual."""

    front_blocks: int

    def create_residual_state(self) -> ResidualState:
        """Fresh state of one guidance branch."""
        return ResidualState()

    @abstractmethod
    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """Which samples to compute: bool ``(B,)``.

        Args:
            state: Has a history; without one the executor computes unasked.
            step: 0-based step index.
            change: float32 ``(B,)``, may hold inf or NaN: those samples compute.
        """
