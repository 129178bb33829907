"""A pipeline's components from its files: constructed, their weights checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from max.driver import Device
from max.graph import Module

from graphs.weights import WeightScope, WeightSlot

from .caches import CACHES, CacheConfig, Calibration, GraphGroup
from .checkpoint import ComponentWeights
from .component import ComponentModel
from .denoising import DenoiserComponent
from .errors import ModelLoadError, RequestError


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline is built from, beside its weights."""

    components: Mapping[str, Mapping[str, Any]]
    """Parsed ``config.json`` of each component, by name."""
    encoding: str = "float32"
    """Compute dtype: ``float32`` or ``bfloat16``."""
    model_name: str = ""
    """For reports."""
    path: Path | None = None
    """The model folder, for tokenizers."""
    weight_ignores: Mapping[str, Sequence[str]] | None = None
    """Patterns of checkpoint tensors that a component does not use, by component."""
    caches: Sequence[str | CacheConfig] = tuple(CACHES)
    """Caches that requests may ask for, beside the pipeline's own; only the graphs
    that these need are compiled. A name stands for the cache at its defaults; an option
    that needs other graphs, such as TaylorSeer's target, takes a configuration."""
    calibration: Calibration = field(default_factory=Calibration)
    """What was measured of the model, for caches that need it."""


@dataclass(frozen=True)
class BuiltComponents:
    """Components whose graphs are in the module, and what fills their weights."""

    components: dict[str, ComponentModel]
    weights: Mapping[str, Any]
    """Arrays by registry name."""
    expected: Mapping[str, WeightSlot]
    """What each of them must be."""


def files_by_component(
    paths: Sequence[Path], names: Collection[str], unprefixed: str | None
) -> dict[str, list[Path]]:
    """Weight files by the component whose folder they lie in.

    Args:
        paths: All files.
        names: Of the components.
        unprefixed: The component of files in no such folder, if there is one.

    Raises:
        RequestError: A file belongs to none.
    """
    files: dict[str, list[Path]] = {}
    for path in paths:
        name: str | None = path.parent.name
        if name not in names:
            name = unprefixed
        if name is None:
            raise RequestError(
                f"weights: {path.name} lies in no folder named after a component "
                f"({', '.join(names)}); move it there or set "
                "unprefixed_weight_component"
            )
        files.setdefault(name, []).append(path)
    return files


def build_components(
    kinds: Mapping[str, type[ComponentModel]],
    config: PipelineConfig,
    devices: list[Device],
    files: Mapping[str, Sequence[Path]],
    groups: frozenset[GraphGroup],
    module: Module,
) -> BuiltComponents:
    """Constructs components, lets each add its graphs, and loads their weights.

    Args:
        kinds: Classes by component name.
        config: What the pipeline is built from.
        devices: Where it runs.
        files: From :func:`files_by_component`.
        groups: Which of the transformer's graphs to build.
        module: Receives all graphs.

    Raises:
        ModelLoadError: Weights missing, left over, of another shape or dtype; all of
            them in one error.
    """
    components: dict[str, ComponentModel] = {}
    problems: list[str] = []
    sources: list[tuple[WeightScope, ComponentWeights]] = []
    for name, kind in kinds.items():
        weights = ComponentWeights.from_files(name, files.get(name, ()))
        settings = config.components.get(name, {})
        component = kind(settings, config.encoding, devices, weights)
        if isinstance(component, DenoiserComponent):
            component.graph_groups = groups
        components[name] = component
        scope = component.build_graphs(module)
        if scope is not None:
            ignores = (config.weight_ignores or {}).get(name, ())
            problems += weights.problems(scope.specs, ignores)
            sources.append((scope, weights))
    if problems:
        raise ModelLoadError("; ".join(problems))
    arrays: dict[str, Any] = {}
    expected: dict[str, WeightSlot] = {}
    for scope, weights in sources:
        slots = scope.slots
        for key, array in weights.load(slots).items():
            arrays[f"{scope.prefix}.{key}"] = array
            expected[f"{scope.prefix}.{key}"] = slots[key]
    return BuiltComponents(components, arrays, expected)
