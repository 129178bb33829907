"""Figures of the engine for Prometheus."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable
from typing import final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from ...engine import EngineObserver, EngineStats, State, TurnRecord

_SAMPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LONG_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


@final
class Metrics(EngineObserver):
    """Counts in a registry of its own, so that two servers in a process stay apart."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._steps = self._counter(
            "steps", "Pictures' steps, by what they did", "cache", "action"
        )
        self._executions = self._counter("graph_executions", "Graph runs", "graph")
        self._graph_seconds = self._counter("graph_seconds", "Inside of graphs")
        self._side_seconds = self._counter(
            "side_seconds", "Encoding and decoding between turns"
        )
        self._turn_seconds = self._histogram(
            "turn_seconds", "A round of steps of all requests", _SECONDS
        )
        self._samples = self._histogram(
            "turn_samples", "Pictures that take a step in one turn", _SAMPLES
        )
        self._batch = self._histogram(
            "batch_samples", "Pictures in one run of a transformer graph", _SAMPLES
        )
        self._requests = Histogram(
            "max_diffusion_request_seconds",
            "From submission to the end, by how it ended",
            ["state"],
            registry=self._registry,
            buckets=_LONG_SECONDS,
        )

    def watch(
        self,
        stats: Callable[[], EngineStats],
        load_seconds: float,
        compile_seconds: float,
    ) -> None:
        """Adds figures that are read whenever they are asked for."""
        for name, text, read in (
            ("queued_requests", "Requests that wait", lambda: stats().queued),
            ("running_requests", "Requests that run", lambda: stats().running),
            ("cache_bytes", "Cache state held", lambda: stats().cache_bytes),
            ("lora_bytes", "Matrices of LoRAs held", lambda: stats().lora_bytes),
            ("reserved_bytes", "Memory planned", lambda: stats().reserved_bytes),
            ("memory_limit_bytes", "Memory allowed", lambda: stats().memory_limit),
        ):
            self._gauge(name, text).set_function(read)
        self._gauge("load_seconds", "Reading weights").set(load_seconds)
        self._gauge("compile_seconds", "Compiling").set(compile_seconds)

    def on_turn(self, record: TurnRecord) -> None:
        """Counts a turn that is over."""
        self._turn_seconds.observe(record.seconds)
        self._samples.observe(record.samples)
        self._graph_seconds.inc(record.graph_seconds)
        runs = Counts(graph for graph, _ in record.batches)
        for graph, number in runs.items():
            self._executions.labels(graph).inc(number)
        for graph, samples in record.batches:
            if graph.endswith((".full", ".embed")):
                self._batch.observe(samples)
        for cache, actions in record.actions.items():
            for action, number in actions.items():
                self._steps.labels(cache, action).inc(number)

    def on_side_jobs(self, seconds: float) -> None:
        """Counts the seconds that encoding and decoding took between turns."""
        self._side_seconds.inc(seconds)

    def on_end(self, state: State, seconds: float) -> None:
        """Counts a request that has ended."""
        self._requests.labels(state.value).observe(seconds)

    def text(self) -> bytes:
        """Returns all figures in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"max_diffusion_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"max_diffusion_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"max_diffusion_{name}", text, registry=self._registry, buckets=buckets
        )
