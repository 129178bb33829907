"""The graphs of one pipeline: compiled once, and extended when a request needs it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, final

from max.driver import Device
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Module

from graphs.weights import WeightSlot

from ..caches import GraphGroup, add_series_graphs
from ..denoising import DenoiserComponent
from ..denoising.loop import TakeStep
from ..errors import MaxDiffusionError, RequestError
from ..execution.artefacts import hash_of
from ..execution.compiler import AdaptedGraphs, CompiledGraphs, open_session
from ..execution.graph_call import over
from ..execution.graph_module import GraphModule
from ..execution.recipe import subject_of
from ..execution.visitors import Visitors
from ..sampling import AbstractGuidance, AbstractSampler
from .loading import OpenedComponents
from .outputs import OnEvent
from .weight_memory import check_weights_fit


@final
class PipelineGraphs:
    """From opened components to executable graphs.

    Args:
        opened: Components whose graphs are built and whose files are checked.
        groups: Graphs of the denoiser, and forecasts, that are compiled at once.
        device: Where they run.
        on_event: Is told of loading, and of compiling where that is needed.
        takes_pictures: Whether graphs for pictures are compiled at once.
        offload_text_encoders: Whether those are in memory only while they encode.
    """

    def __init__(
        self,
        opened: OpenedComponents,
        groups: frozenset[GraphGroup],
        device: Device,
        on_event: OnEvent,
        *,
        takes_pictures: bool = False,
        offload_text_encoders: bool = False,
    ) -> None:
        self.opened = opened.opened_late() if takes_pictures else opened
        self.groups: frozenset[GraphGroup] = groups | {"series"}
        """Graphs that are compiled, or will be; forecasts always are."""
        self.has_pictures = takes_pictures
        """Whether graphs for pictures that requests bring are compiled, or will be."""
        self.load_seconds = 0.0
        """What reading the weights and binding the components took."""
        self._device, self._on_event = device, on_event
        self.offloads_text_encoders = offload_text_encoders
        """Whether those are in memory only while they encode."""
        if offload_text_encoders:
            self._check_offloads()
        self._compiled: CompiledGraphs | None = None
        self._names: set[str] = set()
        # Of weights that LoRAs of one request change.
        self._adapted: AdaptedGraphs | None = None
        self._visitors: Visitors | None = None
        self._slots = {
            name: dict(needs.slots) for name, (needs, _) in opened.sources.items()
        }

    @property
    def is_compiled(self) -> bool:
        """Whether they can run."""
        return self._compiled is not None

    @property
    def models(self) -> Mapping[str, Model]:
        """The executable graphs by name.

        Raises:
            MaxDiffusionError: The model was only opened.
        """
        if self._compiled is None:
            raise _not_compiled()
        return self._compiled.models if self._adapted is None else self._adapted

    @property
    def compile_count(self) -> int:
        """Modules that MAX compiled so far, or had in its cache."""
        return 0 if self._compiled is None else self._compiled.compile_count

    @property
    def compile_seconds(self) -> float:
        """What compiling took, or reading compiled graphs, all together."""
        return 0.0 if self._compiled is None else self._compiled.compile_seconds

    def slots(self, component: str) -> Mapping[str, WeightSlot]:
        """What a component's graphs draw from, by registry name without its own."""
        return self._slots[component]

    def text_encoders(self) -> AbstractContextManager[None]:
        """Keeps text encoders in memory, where they are only while they encode.

        Raises:
            ModelLoadError: Their files have changed or are gone.
            DeviceError: The device's memory is full.
        """
        return nullcontext() if self._visitors is None else self._visitors.present()

    def adapted(self, weights: Mapping[str, Any]) -> AdaptedGraphs:
        """The executable graphs with some weights in place of their own.

        Args:
            weights: Arrays by registry name.

        Raises:
            MaxDiffusionError: The model was only opened.
        """
        if self._compiled is None:
            raise _not_compiled()
        return self._compiled.adapted(weights)

    def over(self, adapted: AdaptedGraphs) -> PipelineGraphs:
        """The same with some weights in place of their own.

        Args:
            adapted: From :meth:`adapted`.
        """
        found = copy.copy(self)
        found._adapted = adapted
        return found

    def routed(self, take_step: TakeStep) -> TakeStep:
        """Steps that run with the weights of these graphs, whoever runs them."""
        adapted = self._adapted
        if adapted is None:
            return take_step
        return lambda *step: over(adapted, take_step(*step))

    def compile(
        self,
        session: InferenceSession | None,
        sampler: AbstractSampler,
        guidance: AbstractGuidance,
        dtype: DType,
    ) -> None:
        """Compiles the graphs or reads them, and loads the weights; once.

        Args:
            session: What compiles, and runs; ``None`` opens one on the device.
            sampler: Brings its graphs.
            guidance: Brings its graphs.
            dtype: Of predictions.

        Raises:
            ModelLoadError: A weight is not finite.
            DeviceError: The weights do not fit.
            CompileError: MAX refused a graph, or only compiled graphs may be used and
                some were not found.
        """
        if self.is_compiled:
            return
        check_weights_fit(self.opened, self._device, dtype)
        started = time.perf_counter()
        compiled = CompiledGraphs(
            session or open_session(self._device),
            self._device,
            self.opened.library,
            self._on_event,
        )

        def load() -> Mapping[str, Any]:
            self._on_event("load", "start")
            weights = self.opened.load()
            self._on_event("load", "end")
            return weights

        self._add(compiled, self.modules(sampler, guidance, dtype), load)
        self._compiled = compiled
        for name, component in self.opened.components.items():
            if name not in self.opened.late:
                component.bind(compiled.models)
                component.load_model()
        if self.offloads_text_encoders:
            names = self.opened.text_encoders
            load = partial(self.opened.load_of, names)
            self._visitors = Visitors(compiled, frozenset(names), load)
        seconds = time.perf_counter() - started
        self.load_seconds = seconds - compiled.compile_seconds

    def require(
        self, groups: Iterable[GraphGroup], denoiser: DenoiserComponent | None
    ) -> None:
        """Compiles graphs that were not compiled with the model, if any are missing.

        Args:
            groups: Of a request's cache.
            denoiser: Whose blocks they are, if they are of a split transformer.

        Raises:
            CompileError: MAX refused a graph.
        """
        missing = frozenset(groups) - self.groups
        if not missing or self._compiled is None:
            return
        if denoiser is not None:
            denoiser.graph_groups = missing
            found = self.opened.modules_of(denoiser)
            denoiser.graph_groups = self.groups | missing
            modules = [each for each in found if each.name not in self._names]
            known = self._compiled.weight_names
            load = partial(self.opened.load_more, modules, known)
            self._add(self._compiled, modules, load)
        self.groups |= missing

    def require_pictures(self) -> None:
        """Compiles what encodes pictures, and keeps parts of them, unless it is there.

        Raises:
            ModelLoadError: The encoder's weights do not fit.
            CompileError: MAX refused a graph.
        """
        if self.has_pictures or self._compiled is None:
            return
        names, compiled = tuple(self.opened.late), self._compiled
        opened = self.opened.opened_late()
        modules = [m for m in opened.modules.values() if m.name not in self._names]
        load = partial(opened.load_more, modules, compiled.weight_names)
        self._add(compiled, modules, load)
        for name in names:
            opened.components[name].bind(compiled.models)
            opened.components[name].load_model()
        self.opened, self.has_pictures = opened, True

    def modules(
        self, sampler: AbstractSampler, guidance: AbstractGuidance, dtype: DType
    ) -> list[GraphModule]:
        """Returns the modules that :meth:`compile` needs, found compiled or built."""
        return [*self.opened.modules.values(), self._steps(sampler, guidance, dtype)]

    def _check_offloads(self) -> None:
        encoders = set(self.opened.text_encoders)
        for name, adapter in self.opened.adapters.items():
            changed = sorted(encoders & adapter.changed.keys())
            if changed:
                raise RequestError(
                    f"offload_text_encoders: the LoRA {name} changes "
                    f"{', '.join(changed)}, which requests can choose only where it "
                    "stays in memory; merge it at load, or keep text encoders there"
                )

    def _steps(
        self, sampler: AbstractSampler, guidance: AbstractGuidance, dtype: DType
    ) -> GraphModule:
        """What a step does beside the transformer, forecasts included."""
        device = DeviceRef.from_device(self._device)

        def build(module: Module) -> None:
            sampler.add_graphs(module, dtype, device)
            guidance.add_graphs(module, dtype, device)
            add_series_graphs(module, dtype, device)

        kinds = [subject_of(type(each)) for each in (sampler, guidance)]
        subject = hash_of("sampler", kinds, dtype.name, self._device.is_host)
        return GraphModule("sampler", build, subject)

    def _add(
        self,
        compiled: CompiledGraphs,
        modules: Sequence[GraphModule],
        load_weights: Callable[[], Mapping[str, Any]],
    ) -> None:
        compiled.add(modules, load_weights)
        for module in modules:
            self._names.add(module.name)
            self._slots.setdefault(module.needs.prefix, {}).update(module.needs.slots)


def _not_compiled() -> MaxDiffusionError:
    return MaxDiffusionError(
        "pipeline: the model is open, but not compiled; call compile() first"
    )
