"""What an engine tells of itself, for metrics and logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .requests import State


@dataclass(frozen=True)
class TurnRecord:
    """One turn of the engine: a round of steps of all requests that had their turn."""

    seconds: float
    """Seconds from the choice of the requests to the last event emitted."""
    graph_seconds: float
    """Seconds of these inside of graphs."""
    requests: int
    """Number of requests that took a step."""
    samples: int
    """Number of their pictures."""
    batches: tuple[tuple[str, int], ...]
    """Name of the graph and number of samples of every execution, in order."""
    actions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Number of samples by the cache's name, then by what it did for them."""


@dataclass(frozen=True)
class EngineStats:
    """How many requests an engine has at a moment, and the bytes they hold."""

    queued: int
    """Number of requests that wait for memory or a place."""
    running: int
    """Number of requests that are encoded, take steps or are decoded."""
    reserved_bytes: int
    """Bytes of the memory plan that are reserved."""
    memory_limit: int
    """Bytes of the memory plan that may be reserved."""
    lora_bytes: int
    """Bytes of the matrices that LoRAs of requests change, in memory now."""
    cache_bytes: int
    """Bytes of cache state held after the last turn, or the last end of a request."""


class EngineObserver:
    """Is told what happens, on the engine's thread; this one does nothing.

    A method that raises is logged, and harms no request.
    """

    def on_turn(self, record: TurnRecord) -> None:
        """Called when a turn is over."""

    def on_side_jobs(self, seconds: float) -> None:
        """Called when encoding and decoding between two turns took so many seconds."""

    def on_end(self, state: State, seconds: float) -> None:
        """Called when a request has ended, so many seconds after its submission."""
