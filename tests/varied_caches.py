"""Each cache with every option at another value than its default."""

from __future__ import annotations

from max_diffusion import (
    AbstractCacheConfig,
    AutoConfig,
    FasterCacheConfig,
    FirstBlockConfig,
    MagCacheConfig,
    NoCacheConfig,
    PabConfig,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
)

VARIED: dict[str, AbstractCacheConfig] = {
    "none": NoCacheConfig(),
    "taylorseer": TaylorSeerConfig(
        *(3, 5, 2, "official", "newton", "attention"),
        compute_steps=(0, 7, 11),
        compute_last=2,
    ),
    "auto": AutoConfig(
        *(1e-5, 6, 2, 12, "newton"), compute_steps="ultra", compute_last=1
    ),
    "step-mask": StepMaskConfig(3, "newton", compute_steps=(0, 3), compute_last=4),
    "first-block": FirstBlockConfig(
        *(0.14, 2, 4, 9, 0.35, 1, "newton", 2, 3), compute_steps=(5,), compute_last=1
    ),
    "magcache": MagCacheConfig(
        *(0.3, 5, 0.125, (1.0, 0.975, 1.0625)), compute_steps="slow", compute_last=1
    ),
    "teacache": TeaCacheConfig(
        0.4, (-3.5, 2e-7, 0.0), compute_steps=(1, 2), compute_last=0
    ),
    "pab": PabConfig(4, -50.0, 912.5, compute_steps="fast", compute_last=3),
    "fastercache": FasterCacheConfig(
        *(3, 5.5, 700.0, 0.25, 4, 8.0, 600.0, 1.25, 1.5, 50.0, 950.0, -9.0, 400.0),
        compute_steps=(2,),
        compute_last=1,
    ),
}
