"""A new cache in one file: compute on a widening grid of steps, forecast the others.

The steps of most models change fast at first and little at the end, so the gap between
two computed steps grows by a factor. Everything else comes from the kind of cache that
it is: how a step runs, what is remembered, and how a forecast is made.

    max-diffusion generate "a green heart" --cache widening \
        --plugin examples/new_cache.py
    max-diffusion compare "a green heart" --caches widening,taylorseer -o report/ \
        --plugin examples/new_cache.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

from max_diffusion import Calibration, ChartStyle, RequestError, register_cache
from max_diffusion.caches import AbstractCacheState, GraphGroup, StateSizes, StepRules
from max_diffusion.caches.series_cache import SeriesCache, SeriesState


@register_cache
@dataclass(frozen=True)
class WideningConfig(StepRules):
    """Options of the widening grid, beside those of ``StepRules``.

    Attributes:
        warmup_steps: Steps at the start that always compute, at least 1.
        growth: Factor from one gap between computed steps to the next, at least 1.
        max_order: Order of the forecast of the other steps, 0 to 4.
    """

    name: ClassVar[str] = "widening"
    summary: ClassVar[str] = "Computes on a grid of steps that widens to the end."
    style: ClassVar[ChartStyle] = ChartStyle("#0b7a75", "P")
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("full", "series")
    ladders: ClassVar = MappingProxyType(
        {
            "warmup_steps": (8, 6, 4, 2),
            "growth": (1.1, 1.2, 1.3, 1.5),
            "max_order": (1, 0),
        }
    )
    coarse: ClassVar = MappingProxyType({"growth": (1.1, 1.3)})

    warmup_steps: int = 4
    growth: float = 1.3
    max_order: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        if self.warmup_steps < 1 or not self.growth >= 1 or not 0 <= self.max_order < 5:
            raise RequestError(
                "widening: expected warmup_steps and growth of at least 1 and a "
                f"max_order of 0 to 4, got {self}"
            )

    def computes(self, step: int) -> bool:
        """Whether a step is on the grid."""
        at, gap = float(self.warmup_steps), 1.0
        while round(at) < step:
            gap *= self.growth
            at += gap
        return step < self.warmup_steps or round(at) == step

    def state_bytes(self, sizes: StateSizes) -> int:
        """The last predictions of each branch."""
        return sizes.branches * (self.max_order + 1) * sizes.prediction

    def create_cache(self, calibration: Calibration) -> Widening:
        """The policy."""
        return Widening(self)


@final
class Widening(SeriesCache):
    """Decides by the step alone, for all samples alike."""

    def __init__(self, config: WideningConfig) -> None:
        super().__init__(config.max_order, "newton")
        self._config = config

    def decide(
        self, state: AbstractCacheState, step: int, batch: int
    ) -> Sequence[bool]:
        """On the grid, or without a history."""
        assert isinstance(state, SeriesState)
        computes = state.history.is_empty or self._config.computes(step)
        return [computes] * batch
