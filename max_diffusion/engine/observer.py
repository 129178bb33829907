"""What an engine tells of itself, for metrics and logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .requests import State


@dataclass(frozen=True)
class TickRecord:
    """One turn of the engine: a step of every request that had its turn."""

    seconds: float
    """All of the steps, from the choice of the requests to the last event told."""
    graph_seconds: float
    """Inside of graphs."""
    requests: int
    """Requests that took a step."""
    samples: int
    """Pictures of theirs."""
    batches: tuple[tuple[str, int], ...]
    """Graph and samples of every execution."""
    actions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """How many samples did what, by cache, then by action."""


@dataclass(frozen=True)
class EngineStats:
    """How an engine stands."""

    queued: int
    """Requests that wait for memory or a place."""
    running: int
    """Requests that are encoded, take steps or are decoded."""
    reserved_bytes: int
    """Of the memory plan."""
    memory_limit: int
    """Bytes that may be reserved."""
    cache_bytes: int
    """Of cache state held after the last turn."""


class EngineObserver:
    """Is told what happens, on the engine's thread; the default does nothing."""

    def on_tick(self, record: TickRecord) -> None:
        """A turn is over."""

    def on_side(self, seconds: float) -> None:
        """Pictures were encoded or decoded."""

    def on_end(self, state: State, seconds: float) -> None:
        """A request has ended, so many seconds after it was submitted."""
