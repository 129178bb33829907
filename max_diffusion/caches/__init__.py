"""The denoising caches: one configuration class per method, known by its name.

A cache is one file here (and one of ``graphs/caches`` if it has a graph of its own),
and a line of ``registry``. Its kind, see ``kinds``, says how a step runs under it.
"""

from __future__ import annotations

from .actions import Action
from .auto import Auto, AutoConfig
from .bound import BoundCache
from .calibration import CALIBRATION_FILE, Calibration
from .config import AbstractCacheConfig, ChartStyle, GraphGroup, StateSizes
from .fastercache import FasterCache, FasterCacheConfig
from .first_block import FirstBlockCache, FirstBlockConfig
from .history import History, add_series_graphs
from .kinds import (
    AbstractCache,
    AbstractCacheState,
    AbstractModuleCache,
    AbstractResidualCache,
    AbstractStepCache,
    DenoisingCacheState,
    GuidanceEstimate,
    ModuleState,
    ResidualState,
    Run,
)
from .magcache import MagCache, MagCacheConfig
from .masks import POLICIES
from .none import NoCache, NoCacheConfig
from .notation import cache_from_options, cache_from_text, caches_from_text, label_of
from .pab import Pab, PabConfig
from .registry import CACHES, register_cache
from .rules import StepRules
from .settings import CacheDefaults, DenoisingCacheConfig
from .step_mask import StepMaskConfig
from .taylorseer import (
    TaylorSeer,
    TaylorSeerBufferState,
    TaylorSeerConfig,
    TaylorSeerModules,
)
from .taylorseer_cache import TaylorSeerCache
from .teacache import TeaCache, TeaCacheConfig

__all__ = [
    "CACHES",
    "CALIBRATION_FILE",
    "POLICIES",
    "AbstractCache",
    "AbstractCacheConfig",
    "AbstractCacheState",
    "AbstractModuleCache",
    "AbstractResidualCache",
    "AbstractStepCache",
    "Action",
    "Auto",
    "AutoConfig",
    "BoundCache",
    "CacheDefaults",
    "Calibration",
    "ChartStyle",
    "DenoisingCacheConfig",
    "DenoisingCacheState",
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
    "cache_from_options",
    "cache_from_text",
    "caches_from_text",
    "label_of",
    "register_cache",
]
