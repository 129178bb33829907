"""What a model can do, and what it takes, told from its files: nothing is compiled."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from graphs.weights import WeightNeeds

from ..caches import CACHES, AbstractCacheConfig, TaylorSeerConfig
from ..checkpoint import ComponentWeights
from ..core.grid import Grid
from ..core.host_memory import free_memory
from ..core.request import MAX_IMAGES, MAX_SIZE
from ..core.validation import whole
from . import open_model
from .context import options_of
from .text_to_image import TextToImagePipeline
from .weight_memory import slot_bytes, weight_bytes


@dataclass(frozen=True)
class ComponentReport:
    """One component's weights."""

    parameters: int
    """Numbers in its files."""
    stored_bytes: int
    """Bytes of these in the files."""
    used_bytes: int
    """Bytes of those that are loaded, at the compute dtype."""


@dataclass(frozen=True)
class MemoryReport:
    """Whether there is room for the weights."""

    weight_bytes: int
    """What they take of the device's memory, at the compute dtype."""
    free_bytes: int
    """What the device has free."""
    fits: tuple[str, ...]
    """Compute dtypes in which they have room."""


@dataclass(frozen=True)
class CacheReport:
    """One cache on one model."""

    is_supported: bool
    reason: str
    """Why not, in one line; empty where it is supported."""
    state_bytes: int
    """Most bytes that a request's state takes, at the options below."""
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ModelReport:
    """A model, its weights, and the caches on it."""

    model: str
    pipeline: str
    """``_class_name`` of its ``model_index.json``."""
    dtype: str
    image_tokens: int
    text_tokens: int
    num_frames: int
    """Frames of what is drawn; 1 of a picture."""
    batch: int
    branches: int
    """2 with true guidance, as requests have it that do not say, or as asked for."""
    takes: tuple[str, ...]
    """What requests may bring of ``image``, ``mask`` and ``strength``."""
    needs: tuple[str, ...]
    """What of it every request must bring."""
    reference_tokens: int
    """Of a reference picture in the shape of what is drawn, of models that read one;
    the caches' state is told with it."""
    components: Mapping[str, ComponentReport]
    memory: MemoryReport
    caches: Mapping[str, CacheReport]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect(
    path_or_repo_id: str | os.PathLike[str] = "demo",
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    true_guidance: bool | None = None,
    options: Mapping[str, object] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    transformer: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
) -> ModelReport:
    """Reads a model's configurations and the headers of its weights.

    Args:
        path_or_repo_id: As for :func:`~max_diffusion.load_pipeline`.
        height: Pixels of the pictures that cache state is told for; default the
            model's.
        width: Likewise.
        batch: Pictures at once.
        true_guidance: Whether there is a second, unconditional branch; default the
            model's, of requests that do not say.
        options: Options of requests that only some models have, such as
            ``num_frames``, that cache state is told for.
        device: Tells the default dtype.
        dtype: Compute dtype.
        calibration: File of measurements instead of the model's own.
        transformer: File of the transformer's weights, instead of the model's.
        variant: Weight files' variant.
        revision: Hub revision.
        show_progress: Show download progress.

    Raises:
        ModelLoadError: No such model, or files that are missing or damaged.
        RequestError: A size the model cannot draw, or an option that it does not have.
    """
    whole("inspect: batch", batch, minimum=1, maximum=MAX_IMAGES)
    for name, size in (("height", height), ("width", width)):
        if size is not None:
            whole(f"inspect: {name}", size, minimum=1, maximum=MAX_SIZE)

    def opened_as(dtype: str | None) -> TextToImagePipeline:
        return open_model(
            path_or_repo_id,
            device,
            dtype,
            caches=("none",),
            calibration=calibration,
            transformer=transformer,
            variant=variant,
            revision=revision,
            show_progress=show_progress,
        )

    pipeline = opened_as(dtype)
    opened = pipeline.graphs.opened
    if true_guidance is None:
        has_negative = pipeline.default_negative_prompt is not None
        true_guidance = has_negative and pipeline.default_true_cfg_scale > 1
    branches = 2 if true_guidance else 1
    asked = options_of(pipeline, options or {})
    frames = pipeline.frames_of(asked)
    grid = pipeline.grid_of(height, width, frames.latent_count)
    image_tokens, pictures = grid.num_tokens, pipeline.pictures
    references: tuple[Grid, ...] = ()
    if pictures is not None:
        sides = grid.rows * pipeline.cell, grid.columns * pipeline.cell
        references = pictures.references([sides], asked)
    read = sum(each.num_tokens for each in references)
    text_tokens = pipeline.text_length(asked)
    shape = (batch, image_tokens, text_tokens)
    return ModelReport(
        model=str(path_or_repo_id),
        pipeline=pipeline.pipeline_config.class_name,
        dtype=pipeline.dtype.name,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        num_frames=frames.count,
        batch=batch,
        branches=branches,
        takes=tuple(sorted(pictures.taken)) if pictures else (),
        needs=tuple(sorted(pictures.needed)) if pictures else (),
        reference_tokens=read,
        components={
            name: _component(*source) for name, source in opened.sources.items()
        },
        memory=_memory(pipeline, opened_as),
        caches={
            name: CacheReport(
                reason=(reason := pipeline.caches.reason_against(config)),
                is_supported=not reason,
                state_bytes=pipeline.caches.state_bytes(config, shape, branches, read),
                options=asdict(config),
            )
            for name, config in _configurations().items()
        },
    )


def _memory(
    pipeline: TextToImagePipeline, opened_as: Callable[[str], TextToImagePipeline]
) -> MemoryReport:
    device, own = pipeline.device, pipeline.dtype.name
    needed = weight_bytes(pipeline.graphs.opened, device)
    free = free_memory(device)
    other = "bfloat16" if own == "float32" else "float32"
    has_room = {own: needed <= free}
    # Weights in bfloat16 take at most what they take in float32. Opening a model of
    # many layers once more takes long.
    if has_room[own] == (own == "float32"):
        has_room[other] = has_room[own]
    else:
        again = opened_as(other).graphs.opened
        has_room[other] = weight_bytes(again, device) <= free
    return MemoryReport(
        needed, free, tuple(name for name in ("float32", "bfloat16") if has_room[name])
    )


def _component(needs: WeightNeeds, weights: ComponentWeights) -> ComponentReport:
    stored = weights.tensors.values()
    return ComponentReport(
        parameters=sum(math.prod(tensor.shape) for tensor in stored),
        stored_bytes=sum(tensor.num_bytes for tensor in stored),
        used_bytes=sum(map(slot_bytes, needs.slots.values())),
    )


def _configurations() -> dict[str, AbstractCacheConfig]:
    """Every cache at its defaults, and TaylorSeer's other targets."""
    found: dict[str, AbstractCacheConfig] = {
        name: kind() for name, kind in CACHES.items()
    }
    for target in ("attention", "modules"):
        found[f"taylorseer, {target}"] = TaylorSeerConfig(target=target)
    return found
