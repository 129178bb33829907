"""TeaCache: skip the blocks while their input's change, rescaled, adds up to little."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final, final

import numpy as np

from ..core.validation import finite, not_negative, numbers
from ..errors import RequestError
from .calibration import Calibration
from .config import THRESHOLDS, ChartStyle, GraphGroup, Ladders, StateSizes
from .history import History
from .kinds import AbstractResidualCache, ResidualState, Run
from .rules import StepRules

MIN_R2: Final = 0.5
"""Smallest share of the residual's change that a fit must explain: below it the input's
change says too little about what would be reused."""


@dataclass(frozen=True)
class TeaCacheConfig(StepRules):
    """Options of TeaCache, beside those of :class:`StepRules`.

    Attributes:
        threshold: Limit that the sum of the rescaled changes of reused steps stays
            below; 0 never reuses.
        coefficients: Polynomial that rescales them, highest power first. Empty for the
            model's own, which ``max-diffusion calibrate`` fits.
        compute_last: Steps at the end that are always computed.
    """

    name: ClassVar[str] = "teacache"
    summary: ClassVar[str] = (
        "Uses the blocks' last result again until the changes seen since have added up."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#8c6d46", "^")
    signal_limit: ClassVar[str] = "threshold"
    ladders: ClassVar[Ladders] = MappingProxyType(
        {
            "threshold": (*THRESHOLDS, 0.8),
            "compute_last": (1, 2, 4),
        }
    )
    coarse: ClassVar[Ladders] = MappingProxyType({"threshold": (0.1, 0.28, 0.56)})
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("blocks", "series")

    threshold: float = 0.25
    coefficients: tuple[float, ...] = ()
    compute_last: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the range of each option."""
        super().__post_init__()
        not_negative("teacache: threshold", self.threshold)
        numbers("teacache: coefficients", self.coefficients, finite)

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of state that a request holds, over all branches."""
        return sizes.branches * (sizes.image + sizes.modulated_input)

    def create_cache(self, calibration: Calibration) -> TeaCache:
        """Creates the policy, with the model's polynomial if none is configured.

        Raises:
            RequestError: Neither the configuration nor the model has coefficients, or
                the model's explain too little.
        """
        if self.coefficients:
            return TeaCache(self, self.coefficients, (0.0, math.inf))
        if not calibration.teacache_coefficients:
            raise RequestError(
                "teacache: no coefficients were fitted to this model; run "
                "max-diffusion calibrate, or give coefficients"
            )
        if calibration.teacache_r2 < MIN_R2:
            raise RequestError(
                f"teacache: refused, this model's fit explains R² "
                f"{calibration.teacache_r2:.2f} of the changes and at least {MIN_R2} "
                "are needed; use another cache, or give coefficients"
            )
        low, high = calibration.teacache_range
        return TeaCache(self, calibration.teacache_coefficients, (low, high))


@final
class TeaCache(AbstractResidualCache):
    """Reuses what all blocks added, sample by sample.

    References:
        Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion
        Model", 2024, arXiv:2411.19108. Differs: one decision a sample, in float32; NaN
        and a zero reference compute; a polynomial below 0 counts as 0, and outside of
        what it was fitted to it is not believed: larger changes compute, smaller ones
        count as the smallest; :meth:`max_diffusion.calibrate` fits the change of the
        residual, which is what is reused, not of the prediction.
    """

    signal = "modulated_input"
    compares_neighbours = True

    def __init__(
        self,
        config: TeaCacheConfig,
        coefficients: tuple[float, ...],
        fitted: tuple[float, float],
    ) -> None:
        self.config = config
        self._fitted = fitted
        self._coefficients = coefficients

    def create_state(self, run: Run) -> ResidualState:
        """Creates a branch's state, without residuals."""
        return ResidualState(History(0, "finite_difference"))

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns all steps but the first; none if the threshold is 0."""
        return run.later_steps if self.config.threshold > 0 else frozenset()

    def measure(self, change: np.ndarray) -> np.ndarray:
        """Returns the polynomial of each change; infinite above the fitted range."""
        low, high = self._fitted
        known = np.maximum(change.astype(np.float64), low)
        rescaled = np.maximum(np.polyval(self._coefficients, known), 0)
        return np.where(known > high, np.inf, rescaled)

    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """Returns True where the sum reaches the threshold, or is NaN."""
        total = state.accumulated + self.measure(change)
        return ~(total < self.config.threshold)
