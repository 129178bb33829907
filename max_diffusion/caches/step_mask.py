"""Step mask: compute the steps of a list or a policy, forecast the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, final

from ..core.validation import count
from ..errors import RequestError
from .calibration import Calibration
from .config import ChartStyle, GraphGroup, Ladders, StateSizes
from .history import MAX_ORDER
from .kinds import AbstractCacheState
from .rules import StepRules
from .series import checked_coefficients
from .series_cache import SeriesCache, history_of


@dataclass(frozen=True)
class StepMaskConfig(StepRules):
    """Options of the step mask: those of :class:`StepRules`, and the forecast's.

    Attributes:
        max_order: Order of the forecast of the other steps, 0 to 4; 0 reuses the last
            computed prediction.
        coefficients: Coefficients of the forecast, see :class:`TaylorSeerConfig`.
    """

    name: ClassVar[str] = "step-mask"
    summary: ClassVar[str] = (
        "Computes the steps of a fixed list and forecasts the others."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#c98a00", "^")
    ladders: ClassVar[Ladders] = MappingProxyType(
        {
            "compute_steps": ("slow", "medium", "fast", "ultra"),
            "max_order": (1, 2, 0),
            "compute_last": (0, 1, 2, 4),
        }
    )
    coarse: ClassVar[Ladders] = MappingProxyType(
        {"compute_steps": ("slow", "medium", "fast", "ultra")}
    )
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("full", "series")

    compute_steps: tuple[int, ...] | str = field(default="medium", kw_only=True)
    max_order: int = 1
    coefficients: str = "finite_difference"

    def __post_init__(self) -> None:
        """Checks the range of each option, and that some steps are named."""
        super().__post_init__()
        if not self.compute_steps:
            raise RequestError(
                "step-mask: compute_steps must name the steps to compute or a policy, "
                "got none"
            )
        count("step-mask: max_order", self.max_order, minimum=0, maximum=MAX_ORDER)
        checked_coefficients("step-mask", self.coefficients)

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of state that a request holds, over all branches."""
        return sizes.branches * (self.max_order + 1) * sizes.prediction

    def create_cache(self, calibration: Calibration) -> StepMask:
        """Creates the policy; needs no calibration."""
        return StepMask(self.max_order, self.coefficients)


@final
class StepMask(SeriesCache):
    """Computes the first step and the steps that the rules require, nothing else.

    References:
        cache-dit 1.5's step masks, which reuse; at ``max_order=0`` so does this.
    """

    def decide(
        self, state: AbstractCacheState, step: int, batch: int
    ) -> Sequence[bool]:
        """Returns True for all samples without a history, else False.

        Steps that the rules require never get here.
        """
        return [history_of(state).is_empty] * batch
