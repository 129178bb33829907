"""Diffusion models as compiled graphs on Modular MAX, with denoising caches.

Names are imported on first use, so that ``import max_diffusion`` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module

# Not typing's, which takes longer to import than all that is here; type checkers know
# the name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from .caches import (
        CACHES,
        AbstractCacheConfig,
        Action,
        AutoConfig,
        BoundCache,
        Calibration,
        ChartStyle,
        DenoisingCacheConfig,
        DenoisingCacheState,
        FasterCacheConfig,
        FirstBlockConfig,
        MagCacheConfig,
        NoCacheConfig,
        PabConfig,
        Run,
        StepMaskConfig,
        TaylorSeerBufferState,
        TaylorSeerCache,
        TaylorSeerConfig,
        TeaCacheConfig,
        register_cache,
    )
    from .caches.cache_file import read_cache_file, write_cache_file
    from .core.grid import Frames, Grid
    from .core.options import RequestOptions, option
    from .core.report import RunReport, StepRecord
    from .core.request import GenerationContext, GenerationRequest, PromptTexts
    from .decorator import taylor_seer
    from .denoising import DenoiserComponent
    from .errors import (
        CacheNotLoadedError,
        CacheStateError,
        CompileError,
        DeviceError,
        MaxDiffusionError,
        ModelLoadError,
        RequestCancelled,
        RequestError,
    )
    from .evaluation.calibration import calibrate
    from .execution.component import ComponentModel
    from .pipelines import (
        DiffusionPipeline,
        DiffusionPipelineOutput,
        GenerationResult,
        PipelineConfig,
        TextToImagePipeline,
        Tokenized,
        demo_model_path,
        load_pipeline,
        open_model,
        register_model,
    )

__version__ = "0.1.0"

# What is imported by these names, besides this package.
_PACKAGES = ("graphs", "max")
_MODULE_OF = {
    "CacheNotLoadedError": "errors",
    "register_model": "pipelines",
    "Tokenized": "pipelines",
    "PromptTexts": "core.request",
    "RequestOptions": "core.options",
    "option": "core.options",
    "Frames": "core.grid",
    "Grid": "core.grid",
    "AbstractCacheConfig": "caches",
    "Action": "caches",
    "AutoConfig": "caches",
    "BoundCache": "caches",
    "CACHES": "caches",
    "CacheStateError": "errors",
    "Calibration": "caches",
    "ChartStyle": "caches",
    "CompileError": "errors",
    "ComponentModel": "execution.component",
    "DenoiserComponent": "denoising",
    "DenoisingCacheConfig": "caches",
    "DenoisingCacheState": "caches",
    "DeviceError": "errors",
    "DiffusionPipeline": "pipelines",
    "DiffusionPipelineOutput": "pipelines",
    "FasterCacheConfig": "caches",
    "FirstBlockConfig": "caches",
    "GenerationContext": "core.request",
    "GenerationRequest": "core.request",
    "GenerationResult": "pipelines",
    "MagCacheConfig": "caches",
    "MaxDiffusionError": "errors",
    "ModelLoadError": "errors",
    "NoCacheConfig": "caches",
    "PabConfig": "caches",
    "PipelineConfig": "pipelines",
    "RequestCancelled": "errors",
    "RequestError": "errors",
    "Run": "caches",
    "RunReport": "core.report",
    "StepMaskConfig": "caches",
    "StepRecord": "core.report",
    "TaylorSeerBufferState": "caches",
    "TaylorSeerCache": "caches",
    "TaylorSeerConfig": "caches",
    "TeaCacheConfig": "caches",
    "TextToImagePipeline": "pipelines",
    "calibrate": "evaluation.calibration",
    "demo_model_path": "pipelines",
    "load_pipeline": "pipelines",
    "open_model": "pipelines",
    "read_cache_file": "caches.cache_file",
    "register_cache": "caches",
    "taylor_seer": "decorator",
    "write_cache_file": "caches.cache_file",
}

__all__ = [
    "CACHES",
    "AbstractCacheConfig",
    "Action",
    "AutoConfig",
    "BoundCache",
    "CacheNotLoadedError",
    "CacheStateError",
    "Calibration",
    "ChartStyle",
    "CompileError",
    "ComponentModel",
    "DenoiserComponent",
    "DenoisingCacheConfig",
    "DenoisingCacheState",
    "DeviceError",
    "DiffusionPipeline",
    "DiffusionPipelineOutput",
    "FasterCacheConfig",
    "FirstBlockConfig",
    "Frames",
    "GenerationContext",
    "GenerationRequest",
    "GenerationResult",
    "Grid",
    "MagCacheConfig",
    "MaxDiffusionError",
    "ModelLoadError",
    "NoCacheConfig",
    "PabConfig",
    "PipelineConfig",
    "PromptTexts",
    "RequestCancelled",
    "RequestError",
    "RequestOptions",
    "Run",
    "RunReport",
    "StepMaskConfig",
    "StepRecord",
    "TaylorSeerBufferState",
    "TaylorSeerCache",
    "TaylorSeerConfig",
    "TeaCacheConfig",
    "TextToImagePipeline",
    "Tokenized",
    "__version__",
    "calibrate",
    "demo_model_path",
    "load_pipeline",
    "open_model",
    "option",
    "read_cache_file",
    "register_cache",
    "register_model",
    "taylor_seer",
    "write_cache_file",
]


def __getattr__(name: str) -> object:
    """Imports a public name's module when the name is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_neighbours()
    try:
        module = import_module(f".{_MODULE_OF[name]}", __name__)
    except ImportError as err:
        # Most likely a script's neighbour of one of these names.
        top = (err.name or "").partition(".")[0]
        found = getattr(sys.modules.get(top), "__file__", None)
        found = found or next(iter(getattr(sys.modules.get(top), "__path__", ())), None)
        if top not in _PACKAGES or found is None:
            raise
        raise _not_ours(top, found) from err
    return getattr(module, name)


def _check_neighbours() -> None:
    """Refuses a file of one of our packages' names before it is run."""
    from importlib.util import find_spec

    for top in _PACKAGES:
        spec = None if top in sys.modules else find_spec(top)
        if spec and spec.origin and spec.submodule_search_locations is None:
            raise _not_ours(top, spec.origin)


def _not_ours(top: str, found: str) -> ImportError:
    return ImportError(
        f"{__name__}: expected its own package {top!r}, got {found}; rename that one, "
        "or take its folder out of sys.path",
        name=top,
        path=found,
    )


def __dir__() -> list[str]:
    return __all__
