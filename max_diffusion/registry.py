"""Model folders to pipelines, by the folder's ``_class_name``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from .caches import (
    CACHES,
    CALIBRATION_FILE,
    CacheConfig,
    Calibration,
    DenoisingCacheConfig,
    NoCacheConfig,
    StepRules,
)
from .checkpoint import ModelFolder, open_model
from .compile import open_session, resolve_device, resolve_dtype
from .errors import ModelLoadError, RequestError
from .loading import PipelineConfig
from .pipeline import OnEvent
from .text_to_image import TextToImagePipeline, named_cache

logger = logging.getLogger(__name__)

# Saved by diffusers' classes for other tasks, with the parts of FluxPipeline. Not
# FluxKontext's: its transformer, of the same class, was trained to edit pictures.
_OTHER_TASKS = ("FluxImg2ImgPipeline", "FluxInpaintPipeline")
# Class name in model_index.json -> module and class, imported on use.
PIPELINES: Mapping[str, tuple[str, str]] = MappingProxyType(
    dict.fromkeys(
        ("FluxPipeline", *_OTHER_TASKS), ("max_diffusion.models.flux1", "Flux1Pipeline")
    )
)


def demo_model_path() -> Path:
    """The folder of the demo model that ships with the package."""
    return Path(__file__).parent / "demo_model"


def is_demo_model(path: Path | None) -> bool:
    """Whether a model folder is the demo model's."""
    return path is not None and path.resolve() == demo_model_path().resolve()


def load_pipeline(
    path_or_repo_id: str | os.PathLike[str] = "demo",
    device: str = "auto",
    dtype: str | None = None,
    cache: str | DenoisingCacheConfig | CacheConfig | None = None,
    *,
    caches: Sequence[str | CacheConfig] = tuple(CACHES),
    calibration: str | os.PathLike[str] | Calibration | None = None,
    variant: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
    on_event: OnEvent | None = None,
    before_compile: Callable[[TextToImagePipeline], object] | None = None,
) -> TextToImagePipeline:
    """Opens a model and compiles it, once.

    The first compile of a model takes minutes and is kept on disk; later ones
    take milliseconds.

    Args:
        path_or_repo_id: ``demo``, a diffusers-layout folder, or a hub repo id.
        device: ``auto``, ``cpu``, ``gpu`` or ``gpu:i``.
        dtype: ``float32`` or ``bfloat16``; default by device.
        cache: Default cache of every request: a name of ``CACHES`` or a configuration.
        caches: Caches that requests may use beside that one, by name, or as a
            configuration where an option needs graphs of its own. Only the graphs they
            need are compiled: fewer start sooner.
        calibration: File of ``max-diffusion calibrate``, or what it holds, instead of
            the model's own.
        variant: Weight files' variant, for example ``fp16``; weights are cast to
            ``dtype``.
        revision: Hub revision.
        show_progress: Show download progress.
        on_event: Called with ``("load" | "compile", "start" | "end")``.
        before_compile: Called with the pipeline before its graphs are compiled, which
            takes minutes: ``lambda p: p.create_context(request)`` tells first whether
            the model can draw a request.

    Raises:
        ModelLoadError: No such model, files missing or damaged, or a model class that
            is not supported.
        CompileError: MAX refused a graph.
        DeviceError: No such device.
        RequestError: An argument is malformed.
    """
    chosen = resolve_device(device)
    wanted = resolve_dtype(dtype, chosen)
    settings = named_cache(cache) if isinstance(cache, str) else cache
    if isinstance(caches, str) or not isinstance(caches, Sequence):
        raise RequestError(
            f"caches: expected a sequence of names and configurations, got {caches!r}"
        )
    for item in caches:
        if isinstance(item, str):
            named_cache(item)
        elif not isinstance(item, NoCacheConfig | StepRules):
            raise RequestError(
                f"caches: expected {', '.join(CACHES)} or a configuration such as "
                f"TaylorSeerConfig(), got {item!r}"
            )
    folder, kind = open_folder(
        path_or_repo_id,
        variant=variant,
        revision=revision,
        show_progress=show_progress,
    )
    components = kind.component_configs(folder)
    assert kind.components is not None
    config = PipelineConfig(
        components=components,
        encoding=wanted.name,
        model_name=str(path_or_repo_id),
        path=folder.path,
        weight_ignores=kind.weight_ignores,
        caches=caches,
        calibration=read_calibration(folder.path, calibration),
    )
    files = [
        file
        for role in kind.components
        if role in folder.roles
        for file in folder.weight_files(role)
    ]
    return kind(
        config,
        open_session(chosen),
        [chosen],
        files,
        settings,
        on_event=on_event,
        before_compile=before_compile,
    )


def read_calibration(
    folder: Path, given: str | os.PathLike[str] | Calibration | None
) -> Calibration:
    """What was given, or the model's own if it has one."""
    if isinstance(given, Calibration):
        return given
    own = folder / CALIBRATION_FILE
    if given is None and not own.is_file():
        return Calibration()
    return Calibration.read(own if given is None else Path(given))


def open_folder(
    path_or_repo_id: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
) -> tuple[ModelFolder, type[TextToImagePipeline]]:
    """A model's folder, downloaded if need be, and the pipeline it is for.

    Raises:
        ModelLoadError: No such model, or one of a class that is not supported; of that
            nothing but ``model_index.json`` is downloaded.
    """
    is_demo = path_or_repo_id == "demo"
    folder = open_model(
        demo_model_path() if is_demo else path_or_repo_id,
        variant=variant,
        revision=revision,
        show_progress=show_progress,
        needs=_needs,
        extras=(CALIBRATION_FILE,),
    )
    if folder.class_name in _OTHER_TASKS:
        logger.info(
            "%s: saved by %s; loaded for text to image",
            folder.name,
            folder.class_name,
        )
    return folder, _kind(folder)


def _kind(folder: ModelFolder) -> type[TextToImagePipeline]:
    """The pipeline a folder is for."""
    if folder.class_name not in PIPELINES:
        raise ModelLoadError(
            f"{folder.name}: model_index.json names {folder.class_name!r}; "
            f"supported are {', '.join(PIPELINES)}"
        )
    module, name = PIPELINES[folder.class_name]
    kind: type[TextToImagePipeline] = vars(import_module(module))[name]
    return kind


def _needs(folder: ModelFolder) -> dict[str, bool]:
    """Roles that the folder's pipeline uses, and whether each has weights."""
    kind = _kind(folder)
    assert kind.components is not None
    for role, names in kind.class_names.items():
        folder.check_listed(role, names)
    return {role: role in kind.components for role in kind.class_names}
