"""Graph calls as values, so that whoever runs a step chooses how to run them.

What a step does is written as a routine: a generator that yields each graph call it
needs, is sent the outputs, and returns its result. A request alone runs them one by
one (:func:`run`); an engine runs equal calls of several requests as one batch. Caches
and models cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import numpy as np
from max.driver import Buffer, Device

from ..core.buffers import to_device

if TYPE_CHECKING:
    from max.engine import Model

T = TypeVar("T")


ALL: Final = 1 << 30
"""Of a call's outputs."""
GUIDANCE, SAMPLER = 1 << 20, (1 << 20) + 1
"""Stages after all blocks."""


@dataclass(frozen=True)
class GraphCall:
    """One execution of a compiled graph."""

    graph: str
    """Its name in the pipeline's module."""
    inputs: tuple[Buffer | np.ndarray, ...]
    """In graph order; arrays are small ones of the host, float32."""
    device: Device
    """Where arrays are copied to."""
    shared: frozenset[int] = frozenset()
    """Positions of inputs without a batch axis; all others have it first, and so do
    all outputs."""
    constant: frozenset[int] = frozenset()
    """Positions of inputs that are the same in all steps of a request."""
    num_passing: int = 0
    """Leading outputs that only go into later calls of the same step; they may be rows
    of a larger buffer. All others are the caller's own, to keep."""
    stage: int = 0
    """How far into the transformer a routine is: of several at once, those behind go
    first, so that they meet. 0 is for what is small."""
    models: Mapping[str, Model] | None = None
    """Where the graph is looked up, if it is one with weights of a request's own."""


@dataclass(frozen=True)
class Fork:
    """Routines that do not need each other; its results come as outputs do."""

    routines: tuple[Routine[Any], ...]


def on_device(value: Buffer | np.ndarray, device: Device) -> Buffer:
    """An input as graphs take it."""
    return to_device(value, device) if isinstance(value, np.ndarray) else value


Routine: TypeAlias = Generator[GraphCall | Fork, Any, T]


def over(models: Mapping[str, Model], routine: Routine[T]) -> Routine[T]:
    """A routine whose graphs have other weights than those of whoever runs it.

    Args:
        models: Graphs by name.
        routine: What calls them.
    """
    outputs: Any = None
    try:
        while True:
            outputs = yield _over(models, routine.send(outputs))
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        routine.close()


def _over(models: Mapping[str, Model], call: GraphCall | Fork) -> GraphCall | Fork:
    if isinstance(call, Fork):
        return Fork(tuple(over(models, each) for each in call.routines))
    return replace(call, models=models)


def model_of(models: Mapping[str, Model], call: GraphCall) -> Model:
    """The graph that a call is of, among the runner's unless it brings its own."""
    return (models if call.models is None else call.models)[call.graph]


def run(models: Mapping[str, Model], routine: Routine[T]) -> T:
    """Runs a routine's calls as they come, and returns its result."""
    try:
        call = next(routine)
        while True:
            if isinstance(call, Fork):
                call = routine.send([run(models, each) for each in call.routines])
            else:
                inputs = [on_device(value, call.device) for value in call.inputs]
                call = routine.send(model_of(models, call).execute(*inputs))
    except StopIteration as stop:
        result: T = stop.value
        return result
