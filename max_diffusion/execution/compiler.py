"""The one module that opens an ``InferenceSession`` and compiles graphs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, final

from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import CompiledModel, InferenceSession, Model

from graphs.weights import WeightSlot

from ..core.host_threads import started_to_wake_late
from ..errors import (
    CompileError,
    DeviceError,
    MaxDiffusionError,
    ModelLoadError,
)
from .artefacts import Artefact
from .compile_cache import prepare_compile_cache
from .compile_memory import memory_watched
from .graph_library import GraphLibrary
from .graph_module import GraphModule

logger = logging.getLogger(__name__)

# That read and initialise compiled graphs: most of the time goes to two of them, the
# transformer's and the decoder's.
_THREADS: Final = 2


@final
class OwnGraphs(Mapping[str, Model]):
    """Executable graphs by name, for the process that made them.

    MAX's threads do not live on in a fork, so that a graph would never end there.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._process = os.getpid()

    def __getitem__(self, name: str) -> Model:
        """A graph.

        Raises:
            DeviceError: This process is a fork of the one that made them.
        """
        check_not_forked(self._process)
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


def open_session(device: Device) -> InferenceSession:
    """A session for ``device``; the host is always part of it.

    Raises:
        DeviceError: This process is a fork of one that compiled graphs.
    """
    check_not_forked(_first_process())
    return InferenceSession(devices=[device])


@final
class AdaptedGraphs(Mapping[str, Model]):
    """A pipeline's graphs by name, some of them with weights of their own.

    Args:
        shared: All of the pipeline's.
        own: Those that differ.
        weights: What they have in place of the pipeline's; MAX reads these very bytes,
            which live as long as this.
    """

    def __init__(
        self,
        shared: Mapping[str, Model],
        own: Mapping[str, Model],
        weights: Mapping[str, Any],
    ) -> None:
        self._shared, self._own, self._weights = shared, own, weights
        # Those that come later may need the weights, too, and have others.
        self._names = frozenset(shared)
        self.num_bytes = sum(map(_num_bytes, weights.values()))
        """Bytes of the weights that differ."""

    def __getitem__(self, name: str) -> Model:
        """A graph, of those that there were then."""
        if name not in self._names:
            raise KeyError(name)
        shared = self._shared[name]  # refuses a fork
        return self._own.get(name, shared)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@final
class CompiledGraphs:
    """The executable graphs of one pipeline; more can be added later.

    Args:
        session: What compiles, and runs.
        device: Where the weights live.
        library: Where compiled graphs may be; ``None`` compiles all.
        on_event: Is told of compiling, where there is anything to compile.
    """

    def __init__(
        self,
        session: InferenceSession,
        device: Device,
        library: GraphLibrary | None = None,
        on_event: Callable[[str, str], None] = lambda stage, what: None,
    ) -> None:
        self._on_event = on_event
        self._session, self._device, self._library = session, device, library
        self._models: dict[str, Model] = {}
        # MAX reads these very bytes and keeps none of them: they live as long as this.
        self._weights: dict[str, Any] = {}
        # Kept for weights that are another's: a module is initialised in milliseconds.
        self._modules: list[tuple[GraphModule, CompiledModel]] = []
        self.models: Mapping[str, Model] = OwnGraphs(self._models)
        """By name; shows what is added later, too."""
        self.compile_count = 0
        """Modules that MAX compiled so far, or had in its cache."""
        self.compile_seconds = 0.0
        """What that took, or reading compiled graphs instead."""

    @property
    def weight_names(self) -> Collection[str]:
        """Registry names of all weights that were given."""
        return self._weights.keys()

    def adapted(self, weights: Mapping[str, Any]) -> AdaptedGraphs:
        """The same graphs with some weights in place of their own; nothing compiles.

        Args:
            weights: Arrays by registry name, like those they replace.

        Raises:
            ModelLoadError: An array is of another shape or dtype.
            DeviceError: The device's memory is full.
        """
        check_not_forked(_first_process())
        with memory_errors_said():
            is_host = self._device.is_host
            own = weights if is_host else _to_device(weights, self._device)
            models: dict[str, Model] = {}
            for module, compiled in self._modules:
                slots = module.needs.named_slots
                changed = {name: slot for name, slot in slots.items() if name in own}
                if changed:
                    _check(own, changed)
                    registry = {
                        name: own.get(name, self._weights[name]) for name in slots
                    }
                    models |= self._session.init_all(
                        compiled, weights_registry=registry
                    )
        return AdaptedGraphs(self.models, models, own)

    def add(
        self,
        modules: Sequence[GraphModule],
        load_weights: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Compiles the graphs of some modules and gives them their weights.

        Args:
            modules: Graphs whose names are new here.
            load_weights: Returns arrays by registry name (``component.checkpoint
                name``) that were not given before; called while compiled graphs are
                read in other threads. Host arrays are copied to the device once, shared
                by all graphs. MAX checks neither shape nor dtype, and would compute on
                whatever bytes it finds.

        Raises:
            ModelLoadError: A slot's array is missing, or of another shape or dtype.
            CompileError: MAX refused the graphs, or has no folder to keep them in, or
                only compiled graphs may be used, and some are missing or damaged.
        """
        check_not_forked(_first_process())
        library = self._library
        found = [[] if library is None else library.find(each) for each in modules]
        with ThreadPoolExecutor(_THREADS) as pool:
            reads = [
                pool.submit(self._read, artefacts, module) if artefacts else None
                for artefacts, module in zip(found, modules, strict=True)
            ]
            weights = load_weights()
            known = {**self._weights, **weights}
            for module in modules:
                _check(known, module.needs.named_slots)
            started = time.perf_counter()
            known_graphs = [None if read is None else read.result() for read in reads]
            compiled = self._complete(modules, known_graphs)
            self.compile_seconds += time.perf_counter() - started
            with memory_errors_said():
                is_host = self._device.is_host
                own = weights if is_host else _to_device(weights, self._device)
                self._weights |= own
                # One after the other on a GPU, whose memory is what there is least of.
                run = pool.map if is_host else map
                for models in run(self._initialise, modules, compiled):
                    self._models |= models
                if not self._modules:
                    self._run_first(modules)
            self._modules += zip(modules, compiled, strict=True)

    def drop(self, prefixes: Collection[str]) -> None:
        """Takes the weights of some components out of memory, and their graphs.

        What is compiled stays.

        Args:
            prefixes: Names of the components.
        """
        if not self._device.is_host:
            self._device.synchronize()  # they may be running
        for module, _ in self._modules:
            if module.needs.prefix in prefixes:
                for name in module.graph_names:
                    self._models.pop(name, None)
                for name in module.needs.named_slots:
                    self._weights.pop(name, None)

    def restore(self, prefixes: Collection[str], weights: Mapping[str, Any]) -> None:
        """Brings back what :meth:`drop` took away.

        Args:
            prefixes: Names of the components.
            weights: All of theirs, arrays by registry name.

        Raises:
            ModelLoadError: An array is missing, or of another shape or dtype.
            DeviceError: The device's memory is full.
        """
        check_not_forked(_first_process())
        pairs = [pair for pair in self._modules if pair[0].needs.prefix in prefixes]
        for module, _ in pairs:
            _check(weights, module.needs.named_slots)
        with memory_errors_said():
            is_host = self._device.is_host
            self._weights |= weights if is_host else _to_device(weights, self._device)
            for module, compiled in pairs:
                self._models |= self._initialise(module, compiled)

    def _read(
        self, artefacts: Sequence[Artefact], module: GraphModule
    ) -> CompiledModel | None:
        assert self._library is not None
        return self._library.read(artefacts, module)

    def _complete(
        self, modules: Sequence[GraphModule], known: Sequence[CompiledModel | None]
    ) -> list[CompiledModel]:
        """Compiles those modules whose graphs are not known."""
        missing = known.count(None)
        if missing:
            self._on_event("compile", "start")
        found = [
            compiled_module(self._session, module) if graphs is None else graphs
            for module, graphs in zip(modules, known, strict=True)
        ]
        if missing:
            self._on_event("compile", "end")
        self.compile_count += missing
        return found

    def _run_first(self, modules: Sequence[GraphModule]) -> None:
        """Runs a graph without weights, at sizes of 1, for what MAX does but once.

        The first execution of a process starts a thread of MAX 26.7 that writes its
        log. It looks for something to write 10,000 times a second, which takes some 8 %
        of a core from whoever computes or idles.
        """
        for module in modules:
            if not module.needs.named_slots:
                model = self._models[module.graph_names[0]]
                inputs = [
                    Buffer.zeros([size or 1 for size in each.shape or ()], each.dtype)
                    for each in model.input_metadata
                ]
                with started_to_wake_late():
                    model.execute(*(each.to(self._device) for each in inputs))
                return

    def _initialise(
        self, module: GraphModule, compiled: CompiledModel
    ) -> Mapping[str, Model]:
        own = {name: self._weights[name] for name in module.needs.named_slots}
        return self._session.init_all(compiled, weights_registry=own)


def compiled_module(session: InferenceSession, module: GraphModule) -> CompiledModel:
    """Compiles a module, or takes it from MAX's own cache.

    Raises:
        CompileError: MAX refused the graphs, or has no folder to keep them in.
    """
    prepare_compile_cache()
    started = time.perf_counter()
    try:
        with memory_watched():
            compiled = session.compile(
                module.module, custom_extensions=list(module.libraries)
            )
    except Exception as err:
        reason = _first_reason(str(err.__cause__ or err))
        raise CompileError(f"compile: MAX refused {module.name}: {reason}") from err
    logger.info("compiled %s in %.2f s", module.name, time.perf_counter() - started)
    return compiled


@contextmanager
def memory_errors_said() -> Iterator[None]:
    """Turns what MAX and numpy raise for want of memory into a DeviceError.

    MAX 26.7 raises a ValueError of several lines for it, told apart by its text only.
    """
    try:
        yield
    except MaxDiffusionError:
        raise  # a RequestError is a ValueError too, and may quote the caller
    except (ValueError, RuntimeError, MemoryError) as err:
        words = ("memory allocation failed", "out of memory", "out_of_memory")
        text = str(err).lower()
        if isinstance(err, MemoryError) or any(word in text for word in words):
            raise DeviceError(
                "device: out of memory; ask for fewer or smaller pictures at a time, "
                "or for bfloat16"
            ) from err
        raise


def _first_reason(text: str) -> str:
    """Of what MAX writes on many lines: the first, and what that announces."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])


@cache
def _first_process() -> int:
    """The process that compiled first: its forks know its answer, and have no MAX."""
    return os.getpid()


def check_not_forked(process: int) -> None:
    """Refuses to go on in a fork.

    Args:
        process: The one that made what is to be used.

    Raises:
        DeviceError: This is another.
    """
    if os.getpid() != process:
        raise DeviceError(
            "device: this process is a fork of one in which MAX has run, and there it "
            'would hang; start processes with multiprocessing.get_context("spawn"), or '
            "fork before anything is loaded"
        )


def _check(weights: Mapping[str, Any], expected: Mapping[str, WeightSlot]) -> None:
    for name, slot in expected.items():
        if name not in weights:
            raise ModelLoadError(f"compile: no array for weight {name}")
        array = weights[name]
        shape = tuple(int(dim) for dim in array.shape)
        dtype = array.dtype
        if not isinstance(dtype, DType):
            dtype = DType.from_numpy(dtype)
        if (shape, dtype) != (slot.shape, slot.dtype):
            raise ModelLoadError(
                f"compile: weight {name} must be {slot.dtype.name} {slot.shape}, "
                f"got {dtype.name} {shape}"
            )


def _num_bytes(array: Any) -> int:
    if isinstance(array, Buffer):
        return int(array.num_elements) * int(array.element_size)
    return int(array.nbytes)


def _to_device(weights: Mapping[str, Any], device: Device) -> dict[str, Buffer]:
    moved = {}
    for name, array in weights.items():
        host = array if isinstance(array, Buffer) else Buffer.from_numpy(array)
        moved[name] = host.to(device)
    return moved
