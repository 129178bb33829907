"""The denoising caches: one configuration class a method, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .auto import Auto, AutoConfig
from .base import AbstractStepCache, GraphGroup, Run, StateSizes
from .calibration import CALIBRATION_FILE, Calibration
from .fastercache import FasterCache, FasterCacheConfig
from .first_block import FirstBlockCache, FirstBlockConfig
from .history import History, add_series_graphs
from .magcache import MagCache, MagCacheConfig
from .masks import POLICIES
from .modules import AbstractModuleCache, GuidanceEstimate, ModuleState
from .none import NoCache, NoCacheConfig
from .pab import Pab, PabConfig
from .residual import AbstractResidualCache, ResidualState
from .rules import StepRules
from .settings import CacheConfig, CacheDefaults, DenoisingCacheConfig
from .step_mask import StepMaskConfig
from .taylorseer import (
    TaylorSeer,
    TaylorSeerBufferState,
    TaylorSeerConfig,
    TaylorSeerModules,
)
from .taylorseer_cache import TaylorSeerCache
from .teacache import TeaCache, TeaCacheConfig

CACHES: Mapping[str, type[CacheConfig]] = MappingProxyType(
    {
        "none": NoCacheConfig,
        "taylorseer": TaylorSeerConfig,
        "first-block": FirstBlockConfig,
        "auto": AutoConfig,
        "step-mask": StepMaskConfig,
        "magcache": MagCacheConfig,
        "teacache": TeaCacheConfig,
        "pab": PabConfig,
        "fastercache": FasterCacheConfig,
    }
)


def cache_name(config: CacheConfig) -> str:
    """The name a configuration goes by in :data:`CACHES`, or that of its class."""
    names = (name for name, kind in CACHES.items() if type(config) is kind)
    return next(names, type(config).__name__)


def label_of(cache: CacheConfig) -> str:
    """A cache's name and what differs from its defaults, as ``--caches`` takes it."""
    defaults = vars(type(cache)())
    changed = (
        f":{key}={_written(value)}"
        for key, value in vars(cache).items()
        if value != defaults[key]
    )
    return cache_name(cache) + "".join(changed)


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


__all__ = [
    "CACHES",
    "CALIBRATION_FILE",
    "POLICIES",
    "AbstractModuleCache",
    "AbstractResidualCache",
    "AbstractStepCache",
    "Auto",
    "AutoConfig",
    "CacheConfig",
    "CacheDefaults",
    "Calibration",
    "DenoisingCacheConfig",
    "FasterCache",
    "FasterCacheConfig",
    "FirstBlockCache",
    "FirstBlockConfig",
    "GraphGroup",
    "GuidanceEstimate",
    "History",
    "MagCache",
    "MagCacheConfig",
    "ModuleState",
    "NoCache",
    "NoCacheConfig",
    "Pab",
    "PabConfig",
    "ResidualState",
    "Run",
    "StateSizes",
    "StepMaskConfig",
    "StepRules",
    "TaylorSeer",
    "TaylorSeerBufferState",
    "TaylorSeerCache",
    "TaylorSeerConfig",
    "TaylorSeerModules",
    "TeaCache",
    "TeaCacheConfig",
    "add_series_graphs",
    "cache_name",
    "label_of",
]
