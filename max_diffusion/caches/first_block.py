"""First-block cache: skip the tail while the first block's residual stands still."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

import numpy as np

from ..core.validation import count, not_negative
from .calibration import Calibration
from .config import THRESHOLDS, ChartStyle, GraphGroup, Ladders, StateSizes
from .history import MAX_ORDER, History
from .kinds import AbstractResidualCache, ResidualState, Run
from .rules import StepRules
from .series import checked_coefficients


@dataclass(frozen=True)
class FirstBlockConfig(StepRules):
    """Options of the first-block cache, beside those of :class:`StepRules`.

    Attributes:
        threshold: Relative change below which a sample reuses the tail; 0 never does.
            Changing it never recompiles.
        warmup_steps: Steps at the start that always compute.
        max_consecutive_cached: Most reused steps in a row; 0 for no limit.
        max_cached_steps: Most reused steps of a request; 0 for no limit.
        max_accumulated_change: Most that the changes of reused steps may add up to
            since the last computed one; 0 for no limit. cache-dit 1.5 never resets
            this sum, so that its cache stays off once the limit is reached.
        tail_order: The tail is forecast by a series of this order from its last
            computed values, 0 to 4; 0 reuses the last one. The threshold decides
            when, the series what.
        coefficients: Coefficients of that series, see :class:`TaylorSeerConfig`.
        front_blocks: Blocks at the start that always run; what they add is compared.
        back_blocks: Blocks at the end that always run, as in cache-dit's dual-block
            cache; what the blocks between add to the text is then reused as well.
    """

    name: ClassVar[str] = "first-block"
    summary: ClassVar[str] = (
        "Runs the first blocks of every step; while they hardly move, the other "
        "blocks' last result is used again."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#2a9d6f", "o")
    signal_limit: ClassVar[str] = "threshold"
    ladders: ClassVar[Ladders] = MappingProxyType(
        {
            "threshold": THRESHOLDS,
            "warmup_steps": (12, 8, 4, 2, 0),
            "tail_order": (0, 1),
            "max_consecutive_cached": (2, 4, 8, 0),
            "compute_last": (0, 1, 2, 4),
        }
    )
    coarse: ClassVar[Ladders] = MappingProxyType(
        {"threshold": (0.03, 0.1, 0.28), "tail_order": (0, 1)}
    )
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("blocks", "series")

    threshold: float = 0.05
    warmup_steps: int = 0
    max_consecutive_cached: int = 0
    max_cached_steps: int = 0
    max_accumulated_change: float = 0.0
    tail_order: int = 0
    coefficients: str = "finite_difference"
    front_blocks: int = 1
    back_blocks: int = 0

    def __post_init__(self) -> None:
        """Checks the range of each option."""
        super().__post_init__()
        not_negative("first-block: threshold", self.threshold)
        count("first-block: warmup_steps", self.warmup_steps, minimum=0)
        limit = self.max_consecutive_cached
        count("first-block: max_consecutive_cached", limit, minimum=0)
        count("first-block: max_cached_steps", self.max_cached_steps, minimum=0)
        not_negative("first-block: max_accumulated_change", self.max_accumulated_change)
        count("first-block: tail_order", self.tail_order, minimum=0, maximum=MAX_ORDER)
        checked_coefficients("first-block", self.coefficients)
        count("first-block: front_blocks", self.front_blocks, minimum=1)
        count("first-block: back_blocks", self.back_blocks, minimum=0)

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of state that a request holds, over all branches."""
        stream = sizes.image + (sizes.text if self.back_blocks else 0)
        tails = (self.tail_order + 1) * stream
        return sizes.branches * (sizes.image + tails)

    def create_cache(self, calibration: Calibration) -> FirstBlockCache:
        """Creates the policy; needs no calibration."""
        return FirstBlockCache(self)


@final
class FirstBlockCache(AbstractResidualCache):
    """Reuses what the blocks in the middle added when a step was last computed.

    The front blocks' residual is compared with that of the last *computed* step, so
    slow drift adds up until it trips the threshold, and the reused tail is added to the
    present front blocks' output, as in diffusers and ParaAttention. MAX 26.7 differs in
    both: it compares neighbouring steps and returns the previous final prediction.

    References:
        ParaAttention's first-block cache (2024), after Liu et al., "Timestep Embedding
        Tells: It's Time to Cache for Video Diffusion Model", arXiv:2411.19108; front
        and back blocks after cache-dit 1.5's dual-block cache. Differs: one decision
        per sample, in float32; NaN and a zero reference compute.
    """

    signal = "residual"

    def __init__(self, config: FirstBlockConfig) -> None:
        self.config = config
        self.front_blocks = config.front_blocks
        self.back_blocks = config.back_blocks

    def create_state(self, run: Run) -> ResidualState:
        """Creates a branch's state, without residuals."""
        return ResidualState(
            self._history(), self._history() if self.back_blocks else None
        )

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps after the warm-up; none if the threshold is 0."""
        is_off, first = self.config.threshold == 0, self.config.warmup_steps
        return frozenset(s for s in run.later_steps if s >= first and not is_off)

    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """Returns True where the change reaches the threshold or a limit, or is NaN."""
        config = self.config
        if step < config.warmup_steps:
            return np.ones(change.shape, bool)
        # Written so that NaN, for which every comparison is false, computes.
        compute = ~(change < config.threshold)
        for limit, reached in (
            (config.max_consecutive_cached, state.consecutive + 1),
            (config.max_cached_steps, state.reused + 1),
            (config.max_accumulated_change, state.accumulated + change),
        ):
            if limit:
                compute |= reached > limit
        return compute

    def _history(self) -> History:
        order, coefficients = self.config.tail_order, self.config.coefficients
        return History(order, coefficients)
