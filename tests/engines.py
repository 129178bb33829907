"""What tests of the engine share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from max_diffusion import GenerationRequest
from max_diffusion.engine import (
    Engine,
    EngineObserver,
    Event,
    RequestHandle,
    State,
    StepTaken,
    TurnRecord,
)


class Recorder(EngineObserver):
    """Keeps what the engine tells its observer."""

    def __init__(self) -> None:
        self.turns: list[TurnRecord] = []
        self.ends: list[State] = []

    def on_turn(self, record: TurnRecord) -> None:
        self.turns.append(record)

    def on_end(self, state: State, seconds: float) -> None:
        self.ends.append(state)


class Gate:
    """A listener that holds the engine's thread at a request's first step."""

    def __init__(self) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepTaken):
            self.is_reached.set()
            assert self.is_open.wait(30)


class Breaking(Mapping[str, Any]):
    """A pipeline's graphs, one of which fails for some inputs."""

    def __init__(self, models: Mapping[str, Any], graph: str, error: Exception) -> None:
        self._models, self._graph, self._error = models, graph, error
        self.bad_sum: float | None = None

    def __getitem__(self, name: str) -> Any:
        return self if name == self._graph else self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def execute(self, *inputs: Any) -> Any:
        """Fails if any sample is the bad one."""
        sums = inputs[0].to_numpy().sum(axis=(1, 2))
        if self.bad_sum is None or np.isclose(sums, self.bad_sum, atol=1e-4).any():
            raise self._error
        return self._models[self._graph].execute(*inputs)


def request(**changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {"prompts": ("a red circle",), "num_inference_steps": 6}
    return GenerationRequest(**(values | changes))


def hold(engine: Engine) -> tuple[Gate, RequestHandle]:
    """A request that stands after its first step."""
    gate = Gate()
    handle = engine.submit(request(num_inference_steps=4), listener=gate)
    assert gate.is_reached.wait(60)
    return gate, handle


def actions(result: Any) -> list[tuple[str, ...]]:
    return [record.actions for record in result.report.steps]
