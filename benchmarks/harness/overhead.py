"""What a step costs beyond its graphs: alone, and in a turn of the engine.

    python -m benchmarks.harness.overhead           as a table
    python -m benchmarks.harness.overhead --json    for programs

The demo model at its own size. A step is from the end of one to the end of the next,
and a turn likewise, encoding and decoding left out. Own time is what is left of it
without the graphs' executions: the loop, the cache, batches put together and taken
apart, events. Figures are medians; whatever else the machine does meanwhile is in them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

from max_diffusion import GenerationRequest, TextToImagePipeline, load_pipeline
from max_diffusion.caches import cache_from_options
from max_diffusion.engine import Engine, EngineObserver, TurnRecord
from max_diffusion.evaluation.machine import machine
from max_diffusion.pipelines.pipeline import DiffusionPipeline

PROMPT = "a red circle above a blue square"
CONCURRENT = (1, 4, 8)


@dataclass(frozen=True)
class Figure:
    """Medians of one kind of step or turn."""

    what: str
    count: int
    """Number of steps or turns measured."""
    graph_ms: float
    """Milliseconds inside of graphs."""
    own_ms: float
    """Milliseconds beside them."""

    @property
    def percent(self) -> float:
        """Own time in percent of the graphs'."""
        return 100 * self.own_ms / self.graph_ms

    @classmethod
    def of(cls, what: str, pairs: Sequence[tuple[float, float]]) -> Figure:
        """Of pairs of seconds: all of a step, and of it those inside of graphs."""
        graphs = statistics.median(inside for _, inside in pairs)
        own = statistics.median(whole - inside for whole, inside in pairs)
        return cls(what, len(pairs), 1e3 * graphs, 1e3 * own)


class Clocked(Mapping[str, Any]):
    """A pipeline's graphs, whose executions are timed."""

    def __init__(self, models: Mapping[str, Any]) -> None:
        self.seconds = 0.0
        self._models = {name: _Clocked(model, self) for name, model in models.items()}

    def __getitem__(self, name: str) -> Any:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


class _Clocked:
    def __init__(self, model: Any, owner: Clocked) -> None:
        self._execute, self._owner = model.execute, owner

    def execute(self, *inputs: Any) -> Any:
        started = time.perf_counter()
        outputs = self._execute(*inputs)
        self._owner.seconds += time.perf_counter() - started
        return outputs


def alone(
    pipeline: TextToImagePipeline, cache: str, steps: int, repeats: int
) -> list[Figure]:
    """Steps of ``pipeline.draw``, those that compute apart from the others."""
    found: dict[str, list[tuple[float, float]]] = {}
    clocked = Clocked(pipeline.models)
    with patch.object(DiffusionPipeline, "models", clocked):
        for repeat in range(repeats + 1):
            ends: list[tuple[float, float]] = []
            result = pipeline.draw(
                _request(steps, cache),
                on_step=lambda done, total, ends=ends: ends.append(  # type: ignore[misc]
                    (time.perf_counter(), clocked.seconds)
                ),
            )
            if repeat == 0:
                continue  # the first allocates
            records = result.report.steps[1:]
            for before, after, record in zip(ends, ends[1:], records, strict=False):
                kind = f"alone, {cache}, {record.actions[0]}"
                pair = after[0] - before[0], after[1] - before[1]
                found.setdefault(kind, []).append(pair)
    return [Figure.of(kind, pairs) for kind, pairs in found.items()]


class _Turns(EngineObserver):
    """Keeps how long each turn took, from the end of the one before."""

    def __init__(self) -> None:
        self.pairs: dict[int, list[tuple[float, float]]] = {}
        self._ended = self._beside = 0.0

    def on_side_jobs(self, seconds: float) -> None:
        self._beside += seconds

    def on_turn(self, record: TurnRecord) -> None:
        now = time.perf_counter()
        pair = now - self._ended - self._beside, record.graph_seconds
        if self._ended:  # the first has none before it
            self.pairs.setdefault(record.requests, []).append(pair)
        self._ended, self._beside = now, 0.0


def in_engine(
    pipeline: TextToImagePipeline, count: int, steps: int, repeats: int
) -> Figure:
    """Turns of an engine in which so many requests take a step."""
    pairs: list[tuple[float, float]] = []
    for repeat in range(repeats + 1):
        turns = _Turns()
        with Engine(pipeline, observer=turns) as engine:
            requests = [_request(steps, "none", seed) for seed in range(count)]
            for handle in [engine.submit(request) for request in requests]:
                handle.result()
        if repeat > 0:
            pairs += turns.pairs[count]
    return Figure.of(f"engine, {count} at once", pairs)


def measure(
    pipeline: TextToImagePipeline, steps: int = 40, repeats: int = 5
) -> list[Figure]:
    """All figures; ``steps`` of each picture, ``repeats`` pictures or rounds each."""
    return [
        *alone(pipeline, "none", steps, repeats),
        *alone(pipeline, "taylorseer", steps, repeats),
        *(in_engine(pipeline, count, steps, repeats) for count in CONCURRENT),
    ]


def _request(steps: int, cache: str, seed: int = 0) -> GenerationRequest:
    return GenerationRequest(
        prompts=(PROMPT,),
        seed=seed,
        num_inference_steps=steps,
        cache=cache_from_options(cache),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.overhead")
    parser.add_argument("--steps", type=int, default=40, help="of each picture")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, after a first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    pipeline = load_pipeline("demo", device="cpu", is_extensible=False)
    figures = measure(pipeline, args.steps, args.repeats)
    if args.json:
        rows = [asdict(figure) | {"percent": figure.percent} for figure in figures]
        print(json.dumps({"machine": machine(), "figures": rows}))
        return
    for figure in figures:
        print(
            f"{figure.what:28} graphs {figure.graph_ms:8.3f} ms, own "
            f"{figure.own_ms:6.3f} ms, {figure.percent:6.1f} % (of {figure.count})"
        )


if __name__ == "__main__":
    main()
