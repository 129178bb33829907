"""MagCache: skip the blocks while their residual's measured decay adds up to little."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

import numpy as np

from ..core.validation import count, not_negative, numbers
from ..errors import RequestError
from .calibration import Calibration
from .config import THRESHOLDS, ChartStyle, GraphGroup, Ladders, StateSizes
from .history import History
from .kinds import AbstractResidualCache, ResidualState, Run
from .rules import StepRules


@dataclass(frozen=True)
class MagCacheConfig(StepRules):
    """Options of MagCache, beside those of :class:`StepRules`.

    Attributes:
        threshold: Most that the error of reused steps may add up to.
        max_consecutive_cached: Most reused steps in a row.
        retention_ratio: Share of the steps, at the start, that always compute, 0 to 1.
        ratios: Ratio of the size of each step's residual to that of the step before,
            one per step; resampled where a run has another number of steps. Empty for
            the model's own, which ``max-diffusion calibrate`` measures.
    """

    name: ClassVar[str] = "magcache"
    summary: ClassVar[str] = (
        "Uses the blocks' last result again in the steps where measurements of "
        "this model say it is safe."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#7b4fa3", "s")
    signal_limit: ClassVar[str] = "threshold"
    ladders: ClassVar[Ladders] = MappingProxyType(
        {
            "threshold": THRESHOLDS,
            "max_consecutive_cached": (2, 3, 4, 6, 8),
            "retention_ratio": (0.4, 0.3, 0.2, 0.1, 0.05),
            "compute_last": (0, 1, 2, 4),
        }
    )
    coarse: ClassVar[Ladders] = MappingProxyType({"threshold": (0.05, 0.14, 0.4)})
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("blocks", "series")

    threshold: float = 0.06
    max_consecutive_cached: int = 3
    retention_ratio: float = 0.2
    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Checks the range of each option."""
        super().__post_init__()
        not_negative("magcache: threshold", self.threshold)
        count("magcache: max_consecutive_cached", self.max_consecutive_cached, 1)
        not_negative("magcache: retention_ratio", self.retention_ratio)
        if self.retention_ratio > 1:
            raise RequestError(
                f"magcache: retention_ratio must be 0 to 1, got {self.retention_ratio}"
            )
        numbers("magcache: ratios", self.ratios, not_negative)

    def computed_steps(
        self, ratios: Sequence[float], num_steps: int, required: Collection[int] = ()
    ) -> frozenset[int]:
        """Returns the 0-based steps of a run that compute.

        Args:
            ratios: Ratios of any number of steps; resampled to ``num_steps``.
            num_steps: Number of steps of the run.
            required: 0-based steps that compute in any case.
        """
        resampled = resample(ratios, num_steps)
        first = int(self.retention_ratio * num_steps + 0.5)
        computed = set()
        product, error, reused = 1.0, 0.0, 0
        for step, ratio in enumerate(resampled):
            if step >= first:
                product *= ratio
                reused += 1
                error += abs(1.0 - product)
                is_allowed = error <= self.threshold
                is_allowed &= reused <= self.max_consecutive_cached
                if is_allowed and step > 0 and step not in required:
                    continue
            computed.add(step)
            product, error, reused = 1.0, 0.0, 0
        return frozenset(computed)

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of state that a request holds, over all branches."""
        return sizes.branches * sizes.image

    def create_cache(self, calibration: Calibration) -> MagCache:
        """Creates the policy, with the model's ratios if none are configured.

        Raises:
            RequestError: Neither the configuration nor the model has ratios.
        """
        ratios = self.ratios or calibration.magcache_ratios
        if not ratios:
            raise RequestError(
                "magcache: no ratios were measured of this model; run max-diffusion "
                "calibrate, or give ratios"
            )
        return MagCache(self, ratios)


@final
class MagCache(AbstractResidualCache):
    """Reuses what all blocks added, by a plan that is known before the run.

    References:
        Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", 2025,
        arXiv:2506.09045; the rule is that of diffusers 0.42. The authors' FLUX script
        also always computes step 11 of 28; ``compute_steps`` can say so.
    """

    def __init__(
        self,
        config: MagCacheConfig,
        ratios: Sequence[float],
    ) -> None:
        self.config = config
        self._ratios = ratios

    def create_state(self, run: Run) -> ResidualState:
        """Creates a branch's state: the plan of the run, and no residual yet."""
        steps = run.steps_for("magcache")
        # They are of a whole run; one that starts from a picture is the end of it.
        ratios = resample(self._ratios, run.skipped_steps + steps)[run.skipped_steps :]
        computed = self.config.computed_steps(ratios, steps, run.required_steps)
        plan = frozenset(range(steps)) - computed
        return ResidualState(History(0, "finite_difference"), plan=plan)

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps that the plan reuses."""
        return self.create_state(run).plan

    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """Returns the plan's decision for the step, the same for all samples."""
        return np.full(change.shape, step not in state.plan)


def resample(ratios: Sequence[float], num_steps: int) -> list[float]:
    """Resamples ratios to ``num_steps`` by nearest neighbours.

    Ties round to even, as in diffusers.
    """
    if len(ratios) == num_steps:
        return list(ratios)
    if num_steps == 1:
        return [ratios[-1]]
    scale = np.float32((len(ratios) - 1) / (num_steps - 1))
    places = np.round(np.arange(num_steps, dtype=np.float32) * scale)
    return [ratios[int(place)] for place in places]
