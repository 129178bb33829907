"""What a model can do, and what it takes, told from its files: nothing is compiled."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from max.graph import Module

from graphs.weights import WeightSlot

from .caches import CACHES, CacheConfig, Calibration, TaylorSeerConfig
from .checkpoint import ComponentWeights
from .checks import whole
from .compile import in_graph_context, resolve_device, resolve_dtype
from .denoising import DenoiserComponent
from .errors import ModelLoadError, RequestError
from .registry import open_folder, read_calibration
from .types import MAX_PICTURES, MAX_SIZE


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
    batch: int
    branches: int
    """2 with true guidance."""
    components: Mapping[str, ComponentReport]
    caches: Mapping[str, CacheReport]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@in_graph_context
def inspect(
    path_or_repo_id: str | os.PathLike[str] = "demo",
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    true_guidance: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
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
        true_guidance: Whether there is a second, unconditional branch.
        device: Tells the default dtype.
        dtype: Compute dtype.
        calibration: File of measurements instead of the model's own.
        variant: Weight files' variant.
        revision: Hub revision.
        show_progress: Show download progress.

    Raises:
        ModelLoadError: No such model, or files that are missing or damaged.
        RequestError: A size the model cannot draw.
    """
    whole("inspect: batch", batch, minimum=1, maximum=MAX_PICTURES)
    for name, size in (("height", height), ("width", width)):
        if size is not None:
            whole(f"inspect: {name}", size, minimum=1, maximum=MAX_SIZE)
    chosen = resolve_device(device)
    wanted = resolve_dtype(dtype, chosen)
    folder, kind = open_folder(
        path_or_repo_id,
        variant=variant,
        revision=revision,
        show_progress=show_progress,
    )
    configs = kind.component_configs(folder)
    assert kind.components is not None
    components, reports = {}, {}
    problems: list[str] = []
    for role, component in kind.components.items():
        files = folder.weight_files(role) if role in folder.roles else ()
        weights = ComponentWeights.from_files(role, files)
        made = component(configs[role], wanted.name, [chosen], weights)
        scope = made.build_graphs(Module())
        if scope is not None:
            ignores = kind.weight_ignores.get(role, ())
            problems += weights.problems(scope.specs, ignores)
        slots = () if scope is None else scope.slots.values()
        stored = weights.tensors.values()
        reports[role] = ComponentReport(
            parameters=sum(math.prod(tensor.shape) for tensor in stored),
            stored_bytes=sum(tensor.num_bytes for tensor in stored),
            used_bytes=sum(map(_bytes, slots)),
        )
        components[role] = made
    if problems:
        raise ModelLoadError("; ".join(problems))
    image_tokens, text_tokens = kind.token_counts(folder, configs, height, width)
    branches = 2 if true_guidance else 1
    return ModelReport(
        model=str(path_or_repo_id),
        pipeline=folder.class_name,
        dtype=wanted.name,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        batch=batch,
        branches=branches,
        components=reports,
        caches=_caches(
            next(c for c in components.values() if isinstance(c, DenoiserComponent)),
            (batch, image_tokens, text_tokens),
            branches,
            read_calibration(folder.path, calibration),
        ),
    )


def _bytes(item: WeightSlot) -> int:
    return math.prod(item.shape) * item.dtype.size_in_bytes


def _caches(
    denoiser: DenoiserComponent,
    shape: tuple[int, int, int],
    branches: int,
    calibration: Calibration,
) -> dict[str, CacheReport]:
    configs: dict[str, CacheConfig] = {name: kind() for name, kind in CACHES.items()}
    for target in ("attention", "modules"):
        configs[f"taylorseer, {target}"] = TaylorSeerConfig(target=target)
    sizes = denoiser.state_sizes(shape, branches)
    reports = {}
    for name, config in configs.items():
        reason = ""
        try:
            denoiser.check_policy(config.create_cache(calibration))
        except RequestError as err:
            reason = str(err)
        reports[name] = CacheReport(
            is_supported=not reason,
            reason=reason,
            state_bytes=config.state_bytes(sizes),
            options=asdict(config),
        )
    return reports
