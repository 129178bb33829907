"""The graphs of one pipeline: compiled once, and extended when a request needs it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, final

from max.driver import Device
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Module

from graphs.weights import WeightSlot

from ..caches import GraphGroup, add_series_graphs
from ..denoising import DenoiserComponent
from ..errors import MaxDiffusionError
from ..execution.compiler import CompiledGraphs, in_graph_context, open_session
from ..sampling import AbstractGuidance, AbstractSampler
from .loading import OpenedComponents
from .outputs import OnEvent


@final
class PipelineGraphs:
    """From opened components to executable graphs.

    Args:
        opened: Components whose graphs are built and whose files are checked.
        groups: Graphs of the denoiser, and forecasts, that are compiled at once.
        device: Where they run.
        on_event: Is told of loading and compiling.
    """

    def __init__(
        self,
        opened: OpenedComponents,
        groups: frozenset[GraphGroup],
        device: Device,
        on_event: OnEvent,
    ) -> None:
        self.opened = opened
        self.groups = groups
        """Graphs that are compiled, or will be."""
        self.load_seconds = 0.0
        """What reading the weights and binding the components took."""
        self._device, self._on_event = device, on_event
        self._compiled: CompiledGraphs | None = None

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
            raise MaxDiffusionError(
                "pipeline: the model is open, but not compiled; call compile() first"
            )
        return self._compiled.models

    @property
    def compile_count(self) -> int:
        """Modules compiled so far: 1, and 1 for each time requests needed more."""
        return 0 if self._compiled is None else self._compiled.compile_count

    @property
    def compile_seconds(self) -> float:
        """What compiling took, all together."""
        return 0.0 if self._compiled is None else self._compiled.compile_seconds

    @in_graph_context
    def compile(
        self,
        session: InferenceSession | None,
        sampler: AbstractSampler,
        guidance: AbstractGuidance,
        dtype: DType,
    ) -> None:
        """Adds the sampler's graphs, compiles all, and loads the weights; once.

        Args:
            session: What compiles, and runs; ``None`` opens one on the device.
            sampler: Brings its graphs.
            guidance: Brings its graphs.
            dtype: Of predictions.

        Raises:
            ModelLoadError: A weight is not finite.
            CompileError: MAX refused a graph.
        """
        if self.is_compiled:
            return
        started = time.perf_counter()
        module, device_ref = self.opened.module, DeviceRef.from_device(self._device)
        sampler.add_graphs(module, dtype, device_ref)
        guidance.add_graphs(module, dtype, device_ref)
        if "series" in self.groups:
            add_series_graphs(module, dtype, device_ref)
        self._on_event("load", "start")
        weights, expected = self.opened.load()
        self._on_event("load", "end")
        compiled = CompiledGraphs(session or open_session(self._device), self._device)
        self._add(compiled, module, weights, expected)
        self._compiled = compiled
        for component in self.opened.components.values():
            component.bind(compiled.models)
            component.load_model()
        seconds = time.perf_counter() - started
        self.load_seconds = seconds - compiled.compile_seconds

    @in_graph_context
    def require(
        self,
        groups: Iterable[GraphGroup],
        denoiser: DenoiserComponent | None,
        dtype: DType,
    ) -> None:
        """Compiles graphs that were not compiled with the model, if any are missing.

        Args:
            groups: Of a request's cache.
            denoiser: Whose blocks they are, if they are of a split transformer.
            dtype: Of predictions.

        Raises:
            CompileError: MAX refused a graph.
        """
        missing = frozenset(groups) - self.groups
        if not missing or self._compiled is None:
            return
        module = Module()
        weights: dict[str, Any] = {}
        expected: dict[str, WeightSlot] = {}
        if denoiser is not None:
            denoiser.graph_groups = missing
            scope = denoiser.build_graphs(module)
            denoiser.graph_groups = self.groups | missing
            known = self._compiled.weight_names
            weights, expected = self.opened.load_more(scope, known)
        if "series" in missing:
            add_series_graphs(module, dtype, DeviceRef.from_device(self._device))
        self._add(self._compiled, module, weights, expected)
        self.groups |= missing

    def _add(
        self,
        compiled: CompiledGraphs,
        module: Module,
        weights: Mapping[str, Any],
        expected: Mapping[str, WeightSlot],
    ) -> None:
        self._on_event("compile", "start")
        compiled.add(module, weights, expected)
        self._on_event("compile", "end")
