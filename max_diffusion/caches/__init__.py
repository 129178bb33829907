"""The denoising caches: one configuration class a method, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .base import (
    AbstractResidualCache,
    AbstractStepCache,
    GraphGroup,
    ResidualState,
)
from .first_block import FirstBlockCache, FirstBlockConfig
from .none import NoCache, NoCacheConfig
from .settings import CacheConfig, CacheDefaults, DenoisingCacheConfig
from .taylorseer import (
    TaylorSeer,
    TaylorSeerBufferState,
    TaylorSeerConfig,
    TaylorSeerState,
)
from .taylorseer_cache import TaylorSeerCache

CACHES: Mapping[str, type[CacheConfig]] = MappingProxyType(
    {
        "none": NoCacheConfig,
        "taylorseer": TaylorSeerConfig,
        "first-block": FirstBlockConfig,
    }
)

__all__ = [
    "CACHES",
    "AbstractResidualCache",
    "AbstractStepCache",
    "CacheConfig",
    "CacheDefaults",
    "DenoisingCacheConfig",
    "FirstBlockCache",
    "FirstBlockConfig",
    "GraphGroup",
    "NoCache",
    "NoCacheConfig",
    "ResidualState",
    "TaylorSeer",
    "TaylorSeerBufferState",
    "TaylorSeerCache",
    "TaylorSeerConfig",
    "TaylorSeerState",
]
