"""The denoising caches: one configuration class a method, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .auto import Auto, AutoConfig
from .base import (
    AbstractResidualCache,
    AbstractStepCache,
    GraphGroup,
    ResidualState,
)
from .first_block import FirstBlockCache, FirstBlockConfig
from .history import History, add_series_graphs
from .none import NoCache, NoCacheConfig
from .rules import POLICIES, StepRules
from .settings import CacheConfig, CacheDefaults, DenoisingCacheConfig
from .step_mask import StepMaskConfig
from .taylorseer import (
    TaylorSeer,
    TaylorSeerBufferState,
    TaylorSeerConfig,
)
from .taylorseer_cache import TaylorSeerCache

CACHES: Mapping[str, type[CacheConfig]] = MappingProxyType(
    {
        "none": NoCacheConfig,
        "taylorseer": TaylorSeerConfig,
        "first-block": FirstBlockConfig,
        "auto": AutoConfig,
        "step-mask": StepMaskConfig,
    }
)

__all__ = [
    "CACHES",
    "POLICIES",
    "AbstractResidualCache",
    "AbstractStepCache",
    "Auto",
    "AutoConfig",
    "CacheConfig",
    "CacheDefaults",
    "DenoisingCacheConfig",
    "FirstBlockCache",
    "FirstBlockConfig",
    "GraphGroup",
    "History",
    "NoCache",
    "NoCacheConfig",
    "ResidualState",
    "StepMaskConfig",
    "StepRules",
    "TaylorSeer",
    "TaylorSeerBufferState",
    "TaylorSeerCache",
    "TaylorSeerConfig",
    "add_series_graphs",
]
