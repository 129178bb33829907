"""Error-controlled TaylorSeer: as many skipped steps as a tolerance allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, final

import numpy as np
from max.driver import Buffer

from ..core.validation import count, not_negative
from ..errors import RequestError
from ..execution.graph_call import Routine
from .calibration import Calibration
from .config import THRESHOLDS, ChartStyle, GraphGroup, Ladders, StateSizes
from .controller import next_gap
from .history import MAX_ORDER
from .kinds import AbstractCacheState, Run
from .rules import StepRules
from .series import COEFFICIENTS, checked_coefficients, exact_degree
from .series_cache import SeriesCache, SeriesState

MAX_INTERVAL: Final = 1_000_000
"""Largest ``max_interval`` in steps: beyond any run, yet small enough that arithmetic
with gaps stays exact."""


@dataclass(frozen=True)
class AutoConfig(StepRules):
    """Options of the error-controlled cache, beside those of :class:`StepRules`.

    Attributes:
        tolerance: Relative error a forecast prediction may have, above 0.
        warmup_steps: Steps at the start that always compute, at least 2: the first
            forecast that can be measured needs one step before it.
        max_order: Highest order of the forecast, 0 to 4.
        max_interval: At least one step in this many is computed; 1 computes all.
        coefficients: Coefficients of the forecast, see :class:`TaylorSeerConfig`.
    """

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = (
        "Forecasts like taylorseer, measures how wrong that is, and computes more "
        "often where it has to."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#d1495b", "s")
    signal_limit: ClassVar[str] = "tolerance"
    ladders: ClassVar[Ladders] = MappingProxyType(
        {
            "tolerance": (0.005, *THRESHOLDS),
            "warmup_steps": (8, 6, 4, 3, 2),
            "max_order": (1, 2),
            "max_interval": (4, 6, 8, 12, 16),
            "compute_last": (0, 1, 2, 4),
            "coefficients": COEFFICIENTS,
        }
    )
    coarse: ClassVar[Ladders] = MappingProxyType({"tolerance": (0.02, 0.07, 0.2, 0.4)})
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("full", "series")

    tolerance: float = 0.05
    warmup_steps: int = 4
    max_order: int = 1
    max_interval: int = 8
    coefficients: str = "finite_difference"

    def __post_init__(self) -> None:
        """Checks the range of each option."""
        super().__post_init__()
        if not not_negative("auto: tolerance", self.tolerance):
            raise RequestError("auto: tolerance must be above 0, got 0")
        count("auto: warmup_steps", self.warmup_steps, minimum=2)
        count("auto: max_order", self.max_order, minimum=0, maximum=MAX_ORDER)
        count("auto: max_interval", self.max_interval, minimum=1, maximum=MAX_INTERVAL)
        checked_coefficients("auto", self.coefficients)

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of state that a request holds, over all branches."""
        return sizes.branches * (self.max_order + 1) * sizes.prediction

    def is_repetition(self) -> bool:
        """Returns True for ``newton`` up to order 1, the same as the default."""
        return self.coefficients == "newton" and self.max_order < 2

    def create_cache(self, calibration: Calibration) -> Auto:
        """Creates the policy; needs no calibration."""
        return Auto(self)


@final
class Auto(SeriesCache):
    """TaylorSeer that chooses its own intervals, sample by sample.

    Every computed step is also forecast from the steps before it, which costs as much
    as skipping one; the relative error of that forecast tells how fast the series goes
    wrong, and a step-size controller how many steps to forecast next.

    References:
        The controller is that of adaptive ODE solvers, see
        :func:`~max_diffusion.caches.controller.next_gap`; the series is that of
        TaylorSeer, arXiv:2503.06923. No published cache combines the two.
    """

    def __init__(self, config: AutoConfig) -> None:
        super().__init__(config.max_order, config.coefficients)
        self.config = config

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps after the warm-up; none if ``max_interval`` is 1."""
        is_off = self.config.max_interval == 1
        first = self.config.warmup_steps
        return frozenset(s for s in run.later_steps if s >= first and not is_off)

    def decide(
        self, state: AbstractCacheState, step: int, batch: int
    ) -> Sequence[bool]:
        """Returns True for the samples whose next computed step has come."""
        assert isinstance(state, SeriesState)
        if state.history.is_empty or step < self.config.warmup_steps:
            return [True] * batch
        return [bool(step >= due) for due in state.due]

    def remember(
        self,
        state: AbstractCacheState,
        noise_pred: Buffer,
        step: int,
        rows: Sequence[int] | None = None,
    ) -> Routine[np.ndarray | None]:
        """Keeps the prediction and returns the relative error of its forecast."""
        assert isinstance(state, SeriesState)
        history = state.history
        if rows is None and not history.continues(noise_pred):
            history.push(noise_pred, step)
            state.due = np.full(int(noise_pred.shape[0]), step + 1)
            return None
        chosen = np.arange(len(state.due)) if rows is None else np.asarray(rows)
        error = yield from history.relative_error(noise_pred, step, rows)
        gap = step - history.last_steps[chosen]
        degrees = [
            exact_degree(int(order), self.config.coefficients)
            for order in history.orders[chosen]
        ]
        history.push(noise_pred, step, rows)
        state.due[chosen] = step + next_gap(
            gap,
            error,
            self.config.tolerance,
            np.array(degrees),
            self.config.max_interval,
        )
        return error
