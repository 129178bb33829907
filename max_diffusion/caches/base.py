"""What a denoising cache is: a policy on the host with state that belongs to a request.

Three kinds. A *step cache* forecasts the prediction of the steps it does not compute. A
*residual cache* runs the first blocks of every step, and knows what the others add
where it does not run them. A *module cache* runs all blocks of every step, and knows
what their attention, or all their modules, give. The executor
(``max_diffusion.denoising``) asks for the kind, never for the name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from max.driver import Buffer

from ..calls import Routine
from ..errors import RequestError

GraphGroup = Literal["full", "blocks", "attention", "modules", "series"]
"""Graphs that come and go together: the whole transformer; its blocks one by one; the
same with what their attention, or all their modules, gave; the forecasts."""


@dataclass(frozen=True)
class Run:
    """What a policy may know of the request beforehand."""

    num_steps: int | None = None
    """Denoising steps."""
    timesteps: tuple[float, ...] | None = None
    """Of every step, 1000 at pure noise, as the scheduler gives them."""
    required_steps: frozenset[int] = frozenset()
    """0-based steps that are computed whatever the policy says."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the image tokens."""
    has_guidance: bool = False
    """Whether there is a second, unconditional branch."""
    is_unconditional: bool = False
    """Whether the state is that branch's."""

    @property
    def later_steps(self) -> frozenset[int]:
        """All steps but the first, which has no history."""
        return frozenset(range(1, self.steps_for("cache")))

    def steps_for(self, name: str) -> int:
        """The number of steps, for a policy that cannot do without."""
        if self.num_steps is None:
            raise RequestError(
                f"{name}: needs the number of steps; give run=Run(num_steps=...) to "
                "create_cache_state"
            )
        return self.num_steps

    def timesteps_for(self, name: str) -> tuple[float, ...]:
        """The timesteps, for a policy that cannot do without."""
        if self.timesteps is None:
            raise RequestError(
                f"{name}: needs the timesteps; give run=Run(timesteps=...) to "
                "create_cache_state"
            )
        return self.timesteps

    def grid_for(self, name: str) -> tuple[int, int]:
        """Rows and columns, for a policy that cannot do without."""
        if self.grid is None:
            raise RequestError(
                f"{name}: needs rows and columns of the image tokens under true "
                "guidance; give grid to denoise"
            )
        return self.grid


@dataclass(frozen=True)
class StateSizes:
    """Bytes of what a cache may keep of a request, each for its whole batch."""

    prediction: int
    """One prediction ``(B, S_img, C)``."""
    image: int
    """The image stream ``(B, S_img, D)``."""
    text: int
    """The text stream ``(B, S_txt, D)``."""
    modulated_input: int
    """What TeaCache compares."""
    modules: Mapping[str, int]
    """The outputs of all blocks' modules, by level."""
    branches: int = 1
    """2 with true guidance."""


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
    def create_state(self, run: Run) -> AbstractCacheState:
        """Fresh state of one guidance branch."""

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Steps that may be forecast, whatever the samples are like."""
        return run.later_steps

    @abstractmethod
    def decide(self, state: AbstractCacheState, step: int, batch: int) -> np.ndarray:
        """Which samples need the transformer: bool ``(B,)``. Changes nothing.

        All of them where there is no history.
        """

    @abstractmethod
    def forecast(self, state: AbstractCacheState, step: int) -> Routine[Buffer]:
        """The prediction ``(B, S_img, C)`` of a step that is not computed."""

    @abstractmethod
    def remember(
        self,
        state: AbstractCacheState,
        noise_pred: Buffer,
        step: int,
        rows: Sequence[int] | None = None,
    ) -> Routine[np.ndarray | None]:
        """Takes in the prediction of a computed step.

        Args:
            state: Changed in place.
            noise_pred: ``(B, S_img, C)``, or of ``rows`` only; kept, uncopied.
            step: 0-based step index.
            rows: Samples that were computed; ``None`` for all.

        Returns:
            What the next decision rests on, one a computed sample, if on anything.
        """
