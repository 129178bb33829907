"""A pipeline's components from its files: constructed, their weights checked."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Final, final

from max.driver import Device

from graphs.weights import TooManyWeights, WeightNeeds

from ..caches import AbstractCacheConfig, Calibration, GraphGroup
from ..checkpoint import ComponentWeights, WeightTransform
from ..checkpoint.lora import Lora, LoraNaming
from ..core.loras import Loras
from ..denoising import DenoiserComponent
from ..errors import MaxDiffusionError, ModelLoadError, RequestError
from ..execution.component import ComponentModel
from ..execution.graph_context import in_graph_context
from ..execution.graph_library import GraphLibrary
from ..execution.graph_module import GraphModule
from ..execution.recipe import recipe_of, subject_of
from ..execution.targets import product_dtype

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
    lora_names: Mapping[str, LoraNaming] | None = None
    """How LoRA files call a component's modules, by component, where that is not its
    name and theirs."""
    loras: Loras = ()
    """LoRA files that are merged into the weights, each with its weight."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA files that requests may choose, by the names they choose them by."""
    adapter_memory_limit: int | None = None
    """Most bytes of the matrices that these change, of all choices in memory together;
    ``None`` for a quarter of what is free."""
    weight_sources: Mapping[str, ComponentWeights] = field(default_factory=dict)
    """Weights of components that are in no files of their own, by component: as their
    graphs ask for them."""
    checkpoint_file: str | None = None
    """The file that these are from, for reports."""
    caches: Sequence[str | AbstractCacheConfig] = LEAN_CACHES
    """Caches whose graphs are compiled at once, beside the pipeline's own cache's. A
    name stands for the cache at its defaults; an option that needs other graphs, such
    as TaylorSeer's target, takes a configuration."""
    is_extensible: bool = True
    """Whether graphs that a request's cache needs beyond these are compiled when it
    first comes, which takes a minute or more; else it is refused."""
    calibration: Calibration = field(default_factory=Calibration)
    """What was measured of the model, for caches that need it."""
    precompiled: Sequence[str | os.PathLike[str]] = ()
    """Folders of ``max-diffusion compile``, in which compiled graphs are looked for
    before those that ship with the package. They are machine code."""
    require_precompiled: bool = False
    """Whether graphs that are not found compiled are an error."""
    offload_text_encoders: bool = False
    """Whether text encoders are in memory only while they encode."""
    takes_pictures: bool = False
    """Whether the graphs for pictures that requests bring are compiled at once; else
    when a request first brings one, if that may be."""

    def loras_with(self, chosen: Loras) -> Loras:
        """Names of the LoRA files of a request without their folders, with weights.

        Args:
            chosen: What it chooses of ``adapters``, beside those that are merged.
        """
        files = (*self.loras, *((self.adapters[name], w) for name, w in chosen))
        return tuple(sorted((Path(file).name, w) for file, w in files if w))


@final
@dataclass(frozen=True)
class OpenedComponents:
    """Components whose graphs are built and whose files are checked; none is loaded."""

    components: Mapping[str, ComponentModel]
    """By name."""
    modules: Mapping[str, GraphModule]
    """Their graphs, by what is in a module; each compiles alone."""
    sources: Mapping[str, tuple[WeightNeeds, ComponentWeights]]
    """What a component's graphs draw from, and the files it is in, by its name; of
    those that have graphs."""
    library: GraphLibrary
    """Where compiled graphs may be."""
    adapters: Mapping[str, Lora] = field(default_factory=dict)
    """What requests may choose, by name; none is merged."""
    late: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Components whose graphs are not built yet, by name, each with the patterns of
    tensors that it does not use."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the components that encode text and have weights."""
        return tuple(
            name
            for name, component in self.components.items()
            if component.is_text_encoder and name in self.sources
        )

    @in_graph_context
    def opened_late(self) -> OpenedComponents:
        """Builds the graphs of the components that were left for later.

        Returns:
            All components, none of which is left.

        Raises:
            ModelLoadError: Weights missing, left over, of another shape or dtype.
        """
        modules, sources = dict(self.modules), dict(self.sources)
        problems: list[str] = []
        for name, ignores in self.late.items():
            component = self.components[name]
            own = graph_modules(component, component.weights, self.library)
            needs = reduce(or_, (module.needs for module in own))
            problems += component.weights.problems(needs.specs, ignores)
            modules |= {module.name: module for module in own}
            sources[name] = (needs, component.weights)
        if problems:
            raise ModelLoadError("; ".join(problems))
        return replace(self, modules=modules, sources=sources, late={})

    def load(self) -> dict[str, Any]:
        """Reads the weights.

        Returns:
            Arrays by registry name.
        """
        arrays: dict[str, Any] = {}
        for needs, weights in self.sources.values():
            for key, array in weights.load(needs.slots).items():
                arrays[f"{needs.prefix}.{key}"] = array
        return arrays

    def load_of(self, names: Iterable[str]) -> dict[str, Any]:
        """Reads the weights of some components.

        Returns:
            Arrays by registry name.
        """
        arrays: dict[str, Any] = {}
        for name in names:
            needs, weights = self.sources[name]
            for key, array in weights.load(needs.slots, check_finite=False).items():
                arrays[f"{needs.prefix}.{key}"] = array
        return arrays

    def load_more(
        self, modules: Iterable[GraphModule], known: Collection[str]
    ) -> dict[str, Any]:
        """Reads what graphs that came later draw from beyond what is loaded.

        Args:
            modules: Their modules.
            known: Registry names that are loaded.

        Returns:
            Arrays by registry name of those that are not.
        """
        arrays: dict[str, Any] = {}
        for module in modules:
            prefix, known = module.needs.prefix, {*known, *arrays}
            slots = {
                key: slot
                for key, slot in module.needs.slots.items()
                if f"{prefix}.{key}" not in known
            }
            if slots:
                loaded = self.sources[prefix][1].load(slots)
                arrays |= {f"{prefix}.{key}": array for key, array in loaded.items()}
        return arrays

    def modules_of(self, component: ComponentModel) -> list[GraphModule]:
        """Returns the modules of a component's graphs, those that have any."""
        source = self.sources.get(component.name)
        weights = component.weights if source is None else source[1]
        return graph_modules(component, weights, self.library)


def graph_modules(
    component: ComponentModel, weights: ComponentWeights, library: GraphLibrary
) -> list[GraphModule]:
    """Returns the modules of a component's graphs, found compiled or built."""
    subject = subject_of(
        type(component),
        component.name,
        dict(component.config),
        component.encoding,
        component.device.is_host and product_dtype(component.dtype).name,
        sorted(weights.names),
    )
    recipe = recipe_of(type(component), subject)
    modules = [
        GraphModule(
            name,
            build,
            subject,
            recipe,
            library.by_recipe(name, recipe),
            is_for_cpu=component.device.is_host,
        )
        for name, build in component.graph_modules().items()
    ]
    return [module for module in modules if module.graph_names]


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
    late: Mapping[str, tuple[str, type[ComponentModel]]] | None = None,
) -> OpenedComponents:
    """Constructs components, finds or builds their graphs, and checks their files.

    Args:
        kinds: Classes by component name.
        config: What the pipeline is built from.
        devices: Where it runs.
        files: From :func:`files_by_component`.
        groups: Which of the transformer's graphs to build.
        late: Components whose graphs are built later, by name, each with the component
            whose configuration and files it has.

    Raises:
        ModelLoadError: Weights missing, left over, of another shape or dtype; all of
            them in one error.
    """
    library = GraphLibrary(
        devices[0], config.precompiled, is_required=config.require_precompiled
    )
    modules: dict[str, GraphModule] = {}
    components: dict[str, ComponentModel] = {}
    problems: list[str] = []
    sources: dict[str, tuple[WeightNeeds, ComponentWeights]] = {}
    for name, kind in kinds.items():
        component = _constructed(name, name, kind, config, devices, files)
        weights = component.weights
        if isinstance(component, DenoiserComponent):
            component.graph_groups = groups
        components[name] = component
        try:
            own = graph_modules(component, weights, library)
        except TooManyWeights as err:
            raise ModelLoadError(
                f"{err} by config.json, and the files hold {len(weights.tensors):,}; "
                "correct a number of layers in it, or download the model again"
            ) from err
        if own:
            modules |= {module.name: module for module in own}
            needs = reduce(or_, (module.needs for module in own))
            ignores = (config.weight_ignores or {}).get(name, ())
            problems += weights.problems(needs.specs, ignores)
            sources[name] = (needs, weights)
    if problems:
        if config.weight_sources:
            problems.append(f"is the file of the same model as {config.model_name}?")
        raise ModelLoadError("; ".join(problems))
    merged, adapters = _open_loras(config, components, sources)
    ignored = config.weight_ignores or {}
    for name, (role, kind) in (late or {}).items():
        components[name] = _constructed(name, role, kind, config, devices, files)
    left = {name: ignored.get(name, ()) for name in late or {}}
    return OpenedComponents(components, modules, merged, library, adapters, left)


def _open_loras(
    config: PipelineConfig,
    components: Mapping[str, ComponentModel],
    sources: Mapping[str, tuple[WeightNeeds, ComponentWeights]],
) -> tuple[dict[str, tuple[WeightNeeds, ComponentWeights]], dict[str, Lora]]:
    """Merges LoRAs into components' weights, and opens those that requests choose."""
    namings = {
        name: LoraNaming.of(name, is_denoiser=isinstance(each, DenoiserComponent))
        for name, each in components.items()
    } | dict(config.lora_names or {})
    adaptable = {
        name: (namings[name], needs.specs) for name, (needs, _) in sources.items()
    }
    merged = dict(sources)
    for file, weight in config.loras:
        for name, adapter in Lora.open(Path(file), adaptable).adapters.items():
            needs, weights = merged[name]
            merged[name] = (needs, weights.adapted(adapter, weight))
    adapters = {
        name: Lora.open(Path(file), adaptable) for name, file in config.adapters.items()
    }
    return merged, adapters


def _of_folder(
    name: str,
    settings: Mapping[str, Any],
    config: PipelineConfig,
    files: Sequence[Path],
) -> ComponentWeights:
    """A component's weights in its own files."""
    weights = ComponentWeights.from_files(name, files)
    _check_not_quantised(name, settings)
    transform = (config.weight_transforms or {}).get(name)
    return weights if transform is None else transform(settings, weights)


def _constructed(
    name: str,
    role: str,
    kind: type[ComponentModel],
    config: PipelineConfig,
    devices: list[Device],
    files: Mapping[str, Sequence[Path]],
) -> ComponentModel:
    """A component with the configuration and the weights of a role."""
    settings = config.components.get(role, {})
    weights = config.weight_sources.get(role)
    if weights is None:
        weights = _of_folder(role, settings, config, files.get(role, ()))
    component = kind(settings, config.encoding, devices, weights)
    component.name = name
    return component


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
    late: Mapping[str, tuple[str, type[ComponentModel]]] | None = None,
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
        late: Components that are opened later, see :func:`open_components`.

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
    return open_components(kinds, config, devices, files, groups, late)
