"""Model folders to pipelines, by the folder's ``_class_name``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..caches import (
    CACHES,
    CALIBRATION_FILE,
    AbstractCacheConfig,
    Calibration,
    DenoisingCacheConfig,
    cache_from_options,
)
from ..checkpoint import CheckpointFile, ModelFolder, WeightTransform, find_model
from ..core.loras import ADAPTER_NAME, GivenLoras, Loras, as_lora_files
from ..core.validation import whole
from ..errors import ModelLoadError, RequestError
from ..execution.devices import resolve_device, resolve_dtype
from .compute_dtype import compute_dtype
from .families import OTHER_TASKS, PIPELINES, pipeline_class
from .generation_defaults import DEFAULTS_FILE, GenerationDefaults
from .loading import LEAN_CACHES, PipelineConfig
from .outputs import OnEvent
from .text_to_image import TextToImagePipeline

logger = logging.getLogger(__name__)


DEMO_MODELS: Final = MappingProxyType(
    {"demo": "demo_model", "demo-video": "demo_video_model"}
)
"""Names of the models that ship with the package, and their folders."""


def demo_model_path(name: str = "demo") -> Path:
    """The folder of a model that ships with the package: ``demo`` or ``demo-video``."""
    return Path(__file__).parent.parent / DEMO_MODELS[name]


def demo_model_name(path: Path | None) -> str | None:
    """Which model that ships with the package a folder is; ``None``: another one."""
    paths = {demo_model_path(name).resolve(): name for name in DEMO_MODELS}
    return None if path is None else paths.get(path.resolve())


def load_pipeline(
    path_or_repo_id: str | os.PathLike[str] = "demo",
    device: str = "auto",
    dtype: str | None = None,
    cache: str | DenoisingCacheConfig | AbstractCacheConfig | None = None,
    *,
    caches: Sequence[str | AbstractCacheConfig] = LEAN_CACHES,
    is_extensible: bool = True,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    transformer: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    loras: GivenLoras | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    adapter_memory_limit: int | None = None,
    precompiled: Sequence[str | os.PathLike[str]] = (),
    require_precompiled: bool = False,
    threads: int | None = None,
    takes_pictures: bool = False,
    offload_text_encoders: bool = False,
    show_progress: bool = False,
    on_event: OnEvent | None = None,
) -> TextToImagePipeline:
    """Opens a model and compiles it, once.

    The first compile of a model takes minutes and is kept on disk; later ones
    take milliseconds.

    Args:
        path_or_repo_id: ``demo``, a diffusers-layout folder, or a hub repo id.
        device: ``auto``, ``cpu``, ``gpu`` or ``gpu:i``.
        dtype: ``float32`` or ``bfloat16``. By default the latter on a GPU, and on a
            processor that multiplies it unless most of the weights are stored in
            float32; else the former.
        cache: Default cache of every request: a name of ``CACHES`` or a configuration.
        caches: Caches whose graphs are compiled at once, beside that one's: names, or a
            configuration where an option needs graphs of its own. The default serves
            what forecasts the prediction: none, taylorseer, auto and step-mask.
        is_extensible: Whether a request with another cache compiles the graphs it
            needs when it first comes, which takes a minute or more; else it is refused.
        calibration: File of ``max-diffusion calibrate``, or what it holds, instead of
            the model's own, which is not used with another ``transformer``.
        transformer: File of the transformer's weights instead of the model's: FLUX.1's
            as safetensors (plain, float8 or scaled float8) or GGUF, by Black Forest
            Labs' names, ComfyUI's or diffusers'. Text encoders and autoencoder are
            taken from it, too, if it holds them.
        variant: Weight files' variant, for example ``fp16``; weights are cast to
            ``dtype``.
        revision: Hub revision.
        loras: LoRA files that are merged into the weights, in float32: one, several, or
            weights by file (``{"style.safetensors": 0.8}``). As PEFT and diffusers,
            Kohya, ComfyUI and XLabs name their tensors.
        adapters: LoRA files by the names that requests choose them by, see
            :meth:`~max_diffusion.TextToImagePipeline.generate`; nothing of them is
            loaded before.
        adapter_memory_limit: Most bytes of the matrices that these change, of all
            choices that are in memory together; what was used longest ago leaves.
            Default a quarter of what is free. A file that alone changes more is
            refused.
        precompiled: Folders of ``max-diffusion compile``, looked into before what ships
            with the package. What they hold is run: they must be yours.
        require_precompiled: Whether graphs that are not found compiled are an error,
            instead of minutes of compiling.
        threads: That compute on the CPU; default one a CPU that the process may use.
            MAX starts them with a process's first model, for all of its models. Linux
            only.
        takes_pictures: Whether the graphs for pictures that requests bring are compiled
            at once; else that is done when a request first brings one.
        offload_text_encoders: Whether text encoders leave the memory of the device, or
            of the host, after encoding. They are read again for the next request, and
            once for all that wait in an engine.
        show_progress: Show download progress.
        on_event: Called with ``("load" | "compile", "start" | "end")``; with the latter
            only where graphs are not found compiled, then or later.

    Raises:
        ModelLoadError: No such model, files missing or damaged, or a model class that
            is not supported; a LoRA that is damaged or does not fit.
        CompileError: MAX refused a graph, or precompiled ones are required and missing.
        DeviceError: No such device, or the weights do not fit in its memory, or one of
            ``adapters`` beside them.
        RequestError: An argument is malformed, or has no effect.
    """
    pipeline = open_model(
        path_or_repo_id,
        device,
        dtype,
        cache,
        caches=caches,
        is_extensible=is_extensible,
        calibration=calibration,
        transformer=transformer,
        variant=variant,
        revision=revision,
        loras=loras,
        adapters=adapters,
        adapter_memory_limit=adapter_memory_limit,
        precompiled=precompiled,
        require_precompiled=require_precompiled,
        threads=threads,
        takes_pictures=takes_pictures,
        offload_text_encoders=offload_text_encoders,
        show_progress=show_progress,
        on_event=on_event,
    )
    pipeline.compile()
    return pipeline


def open_model(
    path_or_repo_id: str | os.PathLike[str] = "demo",
    device: str = "auto",
    dtype: str | None = None,
    cache: str | DenoisingCacheConfig | AbstractCacheConfig | None = None,
    *,
    caches: Sequence[str | AbstractCacheConfig] = LEAN_CACHES,
    is_extensible: bool = True,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    transformer: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    loras: GivenLoras | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    adapter_memory_limit: int | None = None,
    precompiled: Sequence[str | os.PathLike[str]] = (),
    require_precompiled: bool = False,
    threads: int | None = None,
    takes_pictures: bool = False,
    offload_text_encoders: bool = False,
    show_progress: bool = False,
    on_event: OnEvent | None = None,
) -> TextToImagePipeline:
    """Opens a model without compiling it, in seconds.

    What it gives can check requests (``create_context``), tell what caches take
    (``caches``) and be inspected; its ``compile()`` makes it draw.

    Args:
        path_or_repo_id: As for :func:`load_pipeline`, as all others are.
        device: Where it will run.
        dtype: Compute dtype.
        cache: Default cache of every request.
        caches: Caches whose graphs will be compiled at once.
        is_extensible: Whether requests may need other graphs.
        calibration: Measurements instead of the model's own.
        transformer: File of the transformer's weights.
        variant: Weight files' variant.
        revision: Hub revision.
        loras: LoRA files to merge.
        adapters: LoRA files that requests choose.
        adapter_memory_limit: Bytes for what they change.
        precompiled: Folders of compiled graphs.
        require_precompiled: Whether nothing may be compiled.
        threads: That compute on the CPU.
        takes_pictures: Whether requests will bring pictures.
        offload_text_encoders: Whether those are in memory only while they encode.
        show_progress: Show download progress.
        on_event: Is told of loading and compiling.

    Raises:
        ModelLoadError: No such model, files missing or damaged, or a model class that
            is not supported; a LoRA that is damaged or does not fit.
        DeviceError: No such device.
        RequestError: An argument is malformed, or has no effect.
    """
    chosen = resolve_device(device, threads)
    resolve_dtype(dtype, chosen)  # before anything is looked for
    merged = as_lora_files("loras", loras)
    settings = cache_from_options(cache) if isinstance(cache, str) else cache
    file = None
    if transformer is not None:
        file = CheckpointFile.open(transformer, "transformer")
    folder, kind = open_folder(
        path_or_repo_id,
        file=file,
        variant=variant,
        revision=revision,
        show_progress=show_progress,
    )
    if _flag("takes_pictures", takes_pictures) and not kind.picture_components:
        raise RequestError(
            f"takes_pictures: {folder.class_name} draws from text alone; leave it out"
        )
    components = kind.component_configs(folder)
    assert kind.components is not None
    parts = _parts(kind, file)
    files = [
        path
        for role in kind.components
        if role in folder.roles and role not in parts
        for path in folder.weight_files(role)
    ]
    config = PipelineConfig(
        components=components,
        encoding=compute_dtype(dtype, chosen, files, file).name,
        model_name=str(path_or_repo_id),
        class_name=folder.class_name,
        path=folder.path,
        weight_ignores=kind.weight_ignores,
        weight_transforms=kind.weight_transforms,
        lora_names=kind.lora_names,
        loras=merged,
        adapters=_adapters(adapters, merged),
        adapter_memory_limit=_memory_limit(adapter_memory_limit, adapters),
        weight_sources={
            role: read(components[role], file.weights_of(role))
            for role, read in parts.items()
            if file is not None
        },
        checkpoint_file=None if transformer is None else os.fspath(transformer),
        caches=_checked(caches),
        is_extensible=is_extensible,
        # The folder's measurements are of its own transformer.
        calibration=(
            Calibration()
            if calibration is None and file is not None
            else read_calibration(folder.path, calibration)
        ),
        precompiled=_folders(precompiled),
        require_precompiled=_flag("require_precompiled", require_precompiled),
        takes_pictures=takes_pictures or kind.needs_pictures,
        offload_text_encoders=_flag("offload_text_encoders", offload_text_encoders),
    )
    # As measurements are, defaults are of the folder's own transformer.
    own = GenerationDefaults() if file else GenerationDefaults.read(folder.path)
    pipeline = kind(config, None, [chosen], files, settings, on_event=on_event)
    own.set_on(pipeline)
    return pipeline


def _parts(
    kind: type[TextToImagePipeline], file: CheckpointFile | None
) -> Mapping[str, WeightTransform]:
    """The components that a checkpoint file holds."""
    if file is None:
        return {}
    if kind.parts_of_file is None:
        raise ModelLoadError(
            f"transformer: {kind.__name__} reads none from a single file; give a "
            "folder in the diffusers layout that has it"
        )
    return kind.parts_of_file(file)


def _checked(
    caches: Sequence[str | AbstractCacheConfig],
) -> Sequence[str | AbstractCacheConfig]:
    """Names and configurations that a caller gave."""
    if isinstance(caches, str) or not isinstance(caches, Sequence):
        raise RequestError(
            f"caches: expected a sequence of names and configurations, got {caches!r}"
        )
    for item in caches:
        if isinstance(item, str):
            cache_from_options(item)
        elif not isinstance(item, AbstractCacheConfig):
            raise RequestError(
                f"caches: expected {', '.join(CACHES)} or a configuration such as "
                f"TaylorSeerConfig(), got {item!r}"
            )
    return caches


def _folders(
    precompiled: Sequence[str | os.PathLike[str]],
) -> Sequence[str | os.PathLike[str]]:
    """Checks the folders that a caller gave."""
    if isinstance(precompiled, str | os.PathLike):
        raise RequestError(
            f"precompiled: expected a sequence of folders, got {precompiled!r}; write "
            f"[{str(precompiled)!r}]"
        )
    is_list = isinstance(precompiled, list | tuple)
    if not is_list or not all(isinstance(x, str | os.PathLike) for x in precompiled):
        raise RequestError(
            f"precompiled: expected a list of folders, got {precompiled!r}"
        )
    return tuple(precompiled)


def _adapters(
    given: Mapping[str, str | os.PathLike[str]] | None, merged: Loras
) -> Mapping[str, str]:
    """Checks the LoRA files by name that a caller gave."""
    if given is not None and not isinstance(given, Mapping):
        raise RequestError(
            f"adapters: expected files by name such as {{'style': 'style.safetensors'}}"
            f", got {given!r:.80}"
        )
    found: dict[str, str] = {}
    for name, file in (given or {}).items():
        if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
            raise RequestError(
                f"adapters: a name is up to 64 letters, digits, '.', '_' and '-', got "
                f"{name!r:.80}"
            )
        if not isinstance(file, str | os.PathLike):
            raise RequestError(f"adapters: {name}: expected a file, got {file!r:.80}")
        if name in dict(merged):
            raise RequestError(
                f"adapters: {name} is a file of loras, too, and reports could tell the "
                "weight of one of them only; choose another name"
            )
        found[name] = os.fspath(file)
    return found


def _memory_limit(given: int | None, adapters: Mapping[str, Any] | None) -> int | None:
    """Checks the bytes for LoRAs that requests choose."""
    if given is None:
        return None
    limit = whole("adapter_memory_limit", given, minimum=1)
    if not adapters:
        raise RequestError(
            "adapter_memory_limit: has no effect without adapters; leave it out, or "
            "name files"
        )
    return limit


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name}: expected True or False, got {value!r}")
    return value


def read_calibration(
    folder: Path, given: str | os.PathLike[str] | Calibration | None
) -> Calibration:
    """What was given, or the model's own if it has one."""
    if isinstance(given, Calibration):
        return given
    if not isinstance(given, str | os.PathLike | None):
        raise RequestError(
            f"calibration: expected a file, or what one holds, got {given!r:.80}"
        )
    own = folder / CALIBRATION_FILE
    if given is None and not own.is_file():
        return Calibration()
    return Calibration.read(own if given is None else Path(given))


def open_folder(
    path_or_repo_id: str | os.PathLike[str],
    *,
    file: CheckpointFile | None = None,
    variant: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
) -> tuple[ModelFolder, type[TextToImagePipeline]]:
    """A model's folder, downloaded if need be, and the pipeline it is for.

    Of components that a checkpoint file holds no weights are downloaded.

    Raises:
        ModelLoadError: No such model, or one of a class that is not supported; of that
            nothing but ``model_index.json`` is downloaded.
    """
    name = str(path_or_repo_id)
    folder = find_model(
        demo_model_path(name) if name in DEMO_MODELS else path_or_repo_id,
        variant=variant,
        revision=revision,
        show_progress=show_progress,
        needs=partial(_needs, file=file),
        extras=(CALIBRATION_FILE, DEFAULTS_FILE),
    )
    if folder.class_name in OTHER_TASKS:
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
            f"supported are {', '.join(PIPELINES)}; others are made known by "
            "register_model, on the command line by --plugin"
        )
    return pipeline_class(folder.class_name)


def _needs(folder: ModelFolder, file: CheckpointFile | None) -> dict[str, bool]:
    """Roles that the folder's pipeline uses, and whether each has weights there."""
    kind = _kind(folder)
    assert kind.components is not None
    for role, names in kind.class_names.items():
        folder.check_listed(role, names)
    own = kind.components.keys() - _parts(kind, file).keys()
    return {role: role in own for role in kind.class_names}
