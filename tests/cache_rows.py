"""Every method, in configurations that show each of its rules, on a random FLUX.1."""

from __future__ import annotations

from dataclasses import dataclass

from max_diffusion import (
    AbstractCacheConfig,
    AutoConfig,
    FasterCacheConfig,
    FirstBlockConfig,
    MagCacheConfig,
    PabConfig,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
)

STEPS = 12
# Of the random model's 12 steps, from step 5 on timesteps are below 700.
PAB_COMPUTED = (0, 1, 2, 3, 4, 6, 9)
FASTERCACHE_COMPUTED = (0, 1, 2, 3, 4, 6, 8, 10)
PROMPTS = ("a red circle", "two green stars on a gray background", "heart")


@dataclass(frozen=True)
class Row:
    """One method and configuration."""

    name: str
    config: AbstractCacheConfig
    computed: tuple[int, ...] | None = None
    """Steps that compute by the documented rule, where activations have no say."""
    off: AbstractCacheConfig | None = None
    """The same method so that it never skips."""
    is_full: bool = True
    """Whether the run fills all of the state."""
    is_guided_alike: bool = True
    """Whether both guidance branches do the same."""


ROWS = [
    Row(
        "taylorseer",
        TaylorSeerConfig(cache_interval=3, warmup_steps=3),
        (0, 1, 2, 4, 7, 10),
        TaylorSeerConfig(cache_interval=1),
    ),
    Row(
        "taylorseer-official",
        TaylorSeerConfig(3, 3, 3, phase="official", coefficients="newton"),
        (0, 1, 2, 5, 8, 11),
        TaylorSeerConfig(1, 3, 3, phase="official"),
    ),
    Row(
        "taylorseer-absolute-last",
        TaylorSeerConfig(5, 1, 4, phase="absolute", compute_last=1),
        (0, 5, 10, 11),
        TaylorSeerConfig(1, 1, 4, phase="absolute"),
        is_full=False,
    ),
    Row(
        "taylorseer-masked",
        TaylorSeerConfig(4, 2, 0, compute_steps=(5, 6)),
        (0, 1, 3, 5, 6, 7, 11),
    ),
    Row("step-mask", StepMaskConfig(compute_steps=(0, 3, 9)), (0, 3, 9)),
    Row(
        "step-mask-first",
        StepMaskConfig(compute_steps=(4,), max_order=2),
        (0, 4),
        is_full=False,
    ),
    Row(
        "step-mask-policy",
        StepMaskConfig(compute_steps="ultra"),
        # cache-dit's mask of 12 steps.
        (0, 1, 3, 6, 10, 11),
    ),
    Row("first-block", FirstBlockConfig(threshold=0.3), None, FirstBlockConfig(0.0)),
    Row(
        "first-block-forecast",
        FirstBlockConfig(threshold=0.3, tail_order=2, warmup_steps=3, compute_last=1),
        None,
        FirstBlockConfig(0.0, tail_order=2),
    ),
    Row(
        "first-block-consecutive",
        FirstBlockConfig(threshold=1e9, max_consecutive_cached=2),
        (0, 3, 6, 9),
    ),
    Row(
        "first-block-total",
        FirstBlockConfig(threshold=1e9, max_cached_steps=5, compute_steps=(2,)),
        (0, 2, 7, 8, 9, 10, 11),
    ),
    Row(
        "auto",
        AutoConfig(tolerance=0.55, warmup_steps=3),
        None,
        AutoConfig(tolerance=1e-30),
    ),
    Row("auto-order-0", AutoConfig(tolerance=0.2, max_order=0, compute_last=1)),
    Row(
        "auto-cap",
        AutoConfig(tolerance=1e9, warmup_steps=2, max_interval=4),
        # Gaps double up to the cap: 1, 2, 4, 4.
        (0, 1, 3, 7, 11),
    ),
    Row(
        "dual-block",
        FirstBlockConfig(threshold=0.3, front_blocks=2, back_blocks=1),
        None,
        FirstBlockConfig(threshold=0.0, front_blocks=2, back_blocks=1),
    ),
    Row(
        "dual-block-forecast",
        FirstBlockConfig(
            1e9, 3, front_blocks=1, back_blocks=2, tail_order=1, compute_steps=(6, 9)
        ),
        (0, 1, 2, 6, 9),
        FirstBlockConfig(0.0, front_blocks=1, back_blocks=2, tail_order=1),
    ),
    Row(
        "magcache",
        MagCacheConfig(1e9, 2, retention_ratio=0.25, ratios=(1.0, 0.9)),
        (0, 1, 2, 5, 8, 11),
        MagCacheConfig(0.0, ratios=(0.9,)),
    ),
    Row(
        "magcache-masked",
        # Errors of .1, .19, .271: the sum of two is below .3, of three it is not.
        MagCacheConfig(0.3, 9, retention_ratio=0.0, ratios=(0.9,), compute_steps=(4,)),
        (0, 3, 4, 7, 10),
    ),
    Row(
        "teacache",
        TeaCacheConfig(threshold=0.9, coefficients=(1.0, 0.0)),
        None,
        TeaCacheConfig(threshold=0.0, coefficients=(1.0, 0.0)),
    ),
    Row(
        "teacache-constant",
        # .4 a step, so two are reused and the sum of three computes; the last as well.
        TeaCacheConfig(threshold=1.0, coefficients=(0.4,)),
        (0, 3, 6, 9, 11),
    ),
    Row(
        "pab",
        PabConfig(interval=3, min_timestep=-1, max_timestep=700),
        PAB_COMPUTED,
        PabConfig(interval=1),
    ),
    Row(
        "pab-masked",
        PabConfig(99, -1, 700, compute_steps=(7,), compute_last=1),
        (0, 1, 2, 3, 4, 7, 11),
    ),
    Row(
        "fastercache",
        FasterCacheConfig(attention_max_timestep=700),
        FASTERCACHE_COMPUTED,
        FasterCacheConfig(attention_interval=1),
        is_guided_alike=False,
    ),
    *(
        Row(
            f"taylorseer-{target}",
            TaylorSeerConfig(3, 3, order, target=target),
            (0, 1, 2, 4, 7, 10),
            TaylorSeerConfig(1, 3, order, target=target),
        )
        for target, order in (("attention", 1), ("modules", 2))
    ),
]
