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
    from .cache_file import read_cache_file, write_cache_file
    from .caches import (
        CACHES,
        AutoConfig,
        CacheConfig,
        DenoisingCacheConfig,
        FasterCacheConfig,
        FirstBlockConfig,
        NoCacheConfig,
        StepMaskConfig,
        TaylorSeerBufferState,
        TaylorSeerCache,
        TaylorSeerConfig,
    )
    from .calibration import calibrate
    from .component import ComponentModel
    from .decorator import taylor_seer
    from .denoising import DenoiserComponent, DenoisingCacheState
    from .errors import (
        CacheStateError,
        CompileError,
        DeviceError,
        MaxDiffusionError,
        ModelLoadError,
        RequestCancelled,
        RequestError,
    )
    from .loading import PipelineConfig
    from .pipeline import DiffusionPipeline, DiffusionPipelineOutput
    from .registry import demo_model_path, load_pipeline
    from .report import RunReport, StepRecord
    from .text_to_image import GenerationResult, TextToImagePipeline
    from .types import GenerationContext, GenerationRequest

__version__ = "0.1.0"

# What is imported by these names, besides this package.
_PACKAGES = ("graphs", "max")
_MODULE_OF = {
    "AutoConfig": "caches",
    "CACHES": "caches",
    "CacheConfig": "caches",
    "CacheStateError": "errors",
    "Calibration": "caches",
    "CompileError": "errors",
    "ComponentModel": "component",
    "DenoiserComponent": "denoising",
    "DenoisingCacheConfig": "caches",
    "DenoisingCacheState": "denoising",
    "DeviceError": "errors",
    "DiffusionPipeline": "pipeline",
    "DiffusionPipelineOutput": "pipeline",
    "FasterCacheConfig": "caches",
    "FirstBlockConfig": "caches",
    "GenerationContext": "types",
    "GenerationRequest": "types",
    "GenerationResult": "text_to_image",
    "MagCacheConfig": "caches",
    "MaxDiffusionError": "errors",
    "ModelLoadError": "errors",
    "NoCacheConfig": "caches",
    "PabConfig": "caches",
    "PipelineConfig": "loading",
    "RequestCancelled": "errors",
    "RequestError": "errors",
    "Run": "caches",
    "RunReport": "report",
    "StepMaskConfig": "caches",
    "StepRecord": "report",
    "TaylorSeerBufferState": "caches",
    "TaylorSeerCache": "caches",
    "TaylorSeerConfig": "caches",
    "TeaCacheConfig": "caches",
    "TextToImagePipeline": "text_to_image",
    "calibrate": "calibration",
    "demo_model_path": "registry",
    "load_pipeline": "registry",
    "read_cache_file": "cache_file",
    "taylor_seer": "decorator",
    "write_cache_file": "cache_file",
}

__all__ = [
    "CACHES",
    "AutoConfig",
    "CacheConfig",
    "CacheStateError",
    "Calibration",
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
    "GenerationContext",
    "GenerationRequest",
    "GenerationResult",
    "MagCacheConfig",
    "MaxDiffusionError",
    "ModelLoadError",
    "NoCacheConfig",
    "PabConfig",
    "PipelineConfig",
    "RequestCancelled",
    "RequestError",
    "Run",
    "RunReport",
    "StepMaskConfig",
    "StepRecord",
    "TaylorSeerBufferState",
    "TaylorSeerCache",
    "TaylorSeerConfig",
    "TeaCacheConfig",
    "TextToImagePipeline",
    "__version__",
    "calibrate",
    "demo_model_path",
    "load_pipeline",
    "read_cache_file",
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
