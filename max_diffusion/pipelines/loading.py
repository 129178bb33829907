"""A pipeline's components from its files: constructed, their weights checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from max.driver import Device
from max.graph import Module

from graphs.weights import TooManyWeights, WeightScope, WeightSlot

from ..caches import AbstractCacheConfig, Calibration, GraphGroup
from ..checkpoint import ComponentWeights, WeightTransform
from ..denoising import DenoiserComponent
from ..errors import MaxDiffusionError, ModelLoadError, RequestError
from ..execution.compiler import in_graph_context
from ..execution.component import ComponentModel

LEAN_CACHES: Final = ("none", "taylorseer")
"""Caches whose graphs are compiled unless others are named: forecasts of the prediction
cost seconds, single blocks minutes. They serve auto and step-mask as well."""


@dataclass(frozen=True)
class PipelineConfig:
    """What a pipeline is built from, beside its weights."""

    components: Mapping[str, Mapping[str, Any]]
    """Parsed ``config.json`` of each component, by name."""
    encoding: str = "float32"
    """Compute dtype: ``float32`` or ``bfloat16``."""
    model_name: str = ""
    """For reports."""
    class_name: str = ""
    """Class that ``model_index.json`` names, for reports."""
    path: Path | None = None
    """The model folder, for tokenizers."""
    weight_ignores: Mapping[str, Sequence[str]] | None = None
    """Patterns of checkpoint tensors that a component does not use, by component."""
    weight_transforms: Mapping[str, WeightTransform] | None = None
    """What makes of the files' tensors those that a component's graphs ask for, by
    component; of others the files hold just these."""
    caches: Sequence[str | AbstractCacheConfig] = LEAN_CACHES
    """Caches whose graphs are compiled at once, beside the pipeline's own cache's. A
    name stands for the cache at its defaults; an option that needs other graphs, such
    as TaylorSeer's target, takes a configuration."""
    is_extensible: bool = True
    """Whether graphs that a request's cache needs beyond these are compiled when it
    first comes, which takes a minute or more; else it is refused."""
    calibration: Calibration = field(default_factory=Calibration)
    """What was measured of the model, for caches that need it."""


@final
@dataclass(frozen=True)
class OpenedComponents:
    """Components whose graphs are built and whose files are checked; none is loaded."""

    components: Mapping[str, ComponentModel]
    """By name."""
    module: Module
    """All of their graphs."""
    sources: Mapping[str, tuple[WeightScope, ComponentWeights]]
    """What a component's graphs draw from, and the files it is in, by its name; of
    those that have graphs."""

    def load(self) -> tuple[dict[str, Any], dict[str, WeightSlot]]:
        """Reads the weights.

        Returns:
            Arrays by registry name, and what each of them must be.
        """
        arrays: dict[str, Any] = {}
        expected: dict[str, WeightSlot] = {}
        for scope, weights in self.sources.values():
            slots = scope.slots
            for key, array in weights.load(slots).items():
                arrays[f"{scope.prefix}.{key}"] = array
            expected |= named_slots(scope)
        return arrays, expected

    def load_more(
        self, scope: WeightScope, known: Collection[str]
    ) -> tuple[dict[str, Any], dict[str, WeightSlot]]:
        """Reads what graphs that were built later draw from beyond what is loaded.

        Args:
            scope: Theirs.
            known: Registry names that are loaded.

        Returns:
            Arrays by registry name of those that are not, and what all must be.
        """
        weights = next(w for s, w in self.sources.values() if s.prefix == scope.prefix)
        slots = {
            key: slot
            for key, slot in scope.slots.items()
            if f"{scope.prefix}.{key}" not in known
        }
        loaded = weights.load(slots)
        arrays = {f"{scope.prefix}.{key}": array for key, array in loaded.items()}
        return arrays, named_slots(scope)


def named_slots(scope: WeightScope) -> dict[str, WeightSlot]:
    """A scope's slots by their names in the registry."""
    return {f"{scope.prefix}.{key}": slot for key, slot in scope.slots.items()}


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


def open_components(
    kinds: Mapping[str, type[ComponentModel]],
    config: PipelineConfig,
    devices: list[Device],
    files: Mapping[str, Sequence[Path]],
    groups: frozenset[GraphGroup],
) -> OpenedComponents:
    """Constructs components, lets each add its graphs, and checks their files.

    Args:
        kinds: Classes by component name.
        config: What the pipeline is built from.
        devices: Where it runs.
        files: From :func:`files_by_component`.
        groups: Which of the transformer's graphs to build.

    Raises:
        ModelLoadError: Weights missing, left over, of another shape or dtype; all of
            them in one error.
    """
    module = Module()
    components: dict[str, ComponentModel] = {}
    problems: list[str] = []
    sources: dict[str, tuple[WeightScope, ComponentWeights]] = {}
    for name, kind in kinds.items():
        weights = ComponentWeights.from_files(name, files.get(name, ()))
        settings = config.components.get(name, {})
        _check_not_quantised(name, settings)
        transform = (config.weight_transforms or {}).get(name)
        if transform is not None:
            weights = transform(settings, weights)
        component = kind(settings, config.encoding, devices, weights)
        component.name = name
        if isinstance(component, DenoiserComponent):
            component.graph_groups = groups
        components[name] = component
        try:
            scope = component.build_graphs(module)
        except TooManyWeights as err:
            raise ModelLoadError(
                f"{err} by config.json, and the files hold {len(weights.tensors):,}; "
                "correct a number of layers in it, or download the model again"
            ) from err
        if scope is not None:
            ignores = (config.weight_ignores or {}).get(name, ())
            problems += weights.problems(scope.specs, ignores)
            sources[name] = (scope, weights)
    if problems:
        raise ModelLoadError("; ".join(problems))
    return OpenedComponents(components, module, sources)


def _check_not_quantised(name: str, settings: Mapping[str, Any]) -> None:
    quantization = settings.get("quantization_config")
    if quantization is not None:
        method = quantization
        if isinstance(quantization, Mapping):
            method = quantization.get("quant_method", quantization)
        raise ModelLoadError(
            f"{name}: config.json has a quantization_config ({method!s:.60}), and "
            "quantised weights are not supported; use the model as it was published"
        )


@in_graph_context
def open_pipeline_components(
    owner: str,
    kinds: Mapping[str, type[ComponentModel]] | None,
    unprefixed: str | None,
    config: PipelineConfig,
    devices: list[Device],
    weight_paths: Sequence[Path],
    groups: frozenset[GraphGroup],
) -> OpenedComponents:
    """:func:`open_components` from the paths that a pipeline is given.

    Args:
        owner: The pipeline's name, for messages.
        kinds: Classes by component name.
        unprefixed: The component of files in no folder of a component's name.
        config: What the pipeline is built from.
        devices: Where it runs.
        weight_paths: All weight files.
        groups: Which of the transformer's graphs to build.

    Raises:
        MaxDiffusionError: There are no components.
        RequestError: A file belongs to none of them.
        ModelLoadError: See :func:`open_components`.
    """
    if not kinds:
        raise MaxDiffusionError(
            f"{owner}: components must map names to ComponentModel classes, got none; "
            "set the class attribute"
        )
    files = files_by_component(weight_paths, kinds, unprefixed)
    return open_components(kinds, config, devices, files, groups)
