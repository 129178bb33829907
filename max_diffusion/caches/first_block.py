"""First-block cache: skip the tail while the first block's residual stands still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from ..checks import not_negative, whole
from .base import AbstractResidualCache, GraphGroup, ResidualState


@dataclass(frozen=True)
class FirstBlockConfig:
    """Knobs of the first-block cache.

    Attributes:
        threshold: Relative change below which a sample reuses the tail; 0 never does.
            Changing it never recompiles.
        warmup_steps: Steps at the start that always compute.
        max_consecutive_cached: Most reused steps in a row; 0 for no limit.
    """

    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("split",)

    threshold: float = 0.05
    warmup_steps: int = 0
    max_consecutive_cached: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        not_negative("first-block: threshold", self.threshold)
        whole("first-block: warmup_steps", self.warmup_steps, minimum=0)
        limit = self.max_consecutive_cached
        whole("first-block: max_consecutive_cached", limit, minimum=0)


@final
class FirstBlockCache(AbstractResidualCache):
    """Reuses what the blocks after the first added when that step was last computed.

    The residual is compared with that of the last *computed* step, so slow drift adds
    up until it trips the threshold, and the reused tail is added to the present first
    block's output, as in diffusers and ParaAttention. MAX 26.7 differs in both: it
    compares neighbouring steps and returns the previous final prediction.

    References:
        ParaAttention's first-block cache (2024), after Liu et al., "Timestep Embedding
        Tells: It's Time to Cache for Video Diffusion Model", arXiv:2411.19108. Differs:
        one decision per sample, in float32; NaN and a zero reference compute.
    """

    front_blocks = 1

    def __init__(self, config: FirstBlockConfig) -> None:
        self.config = config

    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """True where the change reaches the threshold or is not a number."""
        if step < self.config.warmup_steps:
            return np.ones(change.shape, bool)
        # Written so that NaN, for which every comparison is false, computes.
        compute = ~(change < self.config.threshold)
        limit = self.config.max_consecutive_cached
        if limit:
            compute |= state.consecutive >= limit
        return compute
