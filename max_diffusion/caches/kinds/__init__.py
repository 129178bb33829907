"""The kinds of caches: each brings the routine that runs a step under it."""

from .base import (
    AbstractCache,
    AbstractCacheState,
    FullTransformer,
    GuidanceEstimate,
    Hidden,
    Inputs,
    Run,
    SplitTransformer,
)
from .module import AbstractModuleCache, ModuleMemory, ModuleState
from .residual import AbstractResidualCache, ResidualState, TailMemory
from .state import DenoisingCacheState
from .step import AbstractStepCache

__all__ = [
    "AbstractCache",
    "AbstractCacheState",
    "AbstractModuleCache",
    "AbstractResidualCache",
    "AbstractStepCache",
    "DenoisingCacheState",
    "FullTransformer",
    "GuidanceEstimate",
    "Hidden",
    "Inputs",
    "ModuleMemory",
    "ModuleState",
    "ResidualState",
    "Run",
    "SplitTransformer",
    "TailMemory",
]
