"""The limits of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.validation import count, whole


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_running: Most requests that hold memory at a time.
        max_queued: Most requests that wait; one more is refused.
        max_queued_bytes: Most bytes of noise and pictures, as they are drawn from, of
            those that wait; one more is refused, but for the first. They are in the
            memory of the host, and in no other limit.
        max_step_samples: Most pictures that take a step in one turn; where there are
            more, they take turns.
        max_batch: Most pictures in one execution of a graph, but for a request that
            has more of its own. On two CPU cores the demo model is fastest with 8:
            3.0 ms a picture, against 5.3 ms alone.
        memory_limit: Bytes for all that running requests hold, and for decoding one
            picture at a time at least; ``None`` for half of what is free at the
            start.

    Raises:
        RequestError: A limit is no whole number, or is out of range.
    """

    max_running: int = 64
    max_queued: int = 256
    max_queued_bytes: int = 2**30
    max_step_samples: int = 16
    max_batch: int = 8
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        count("engine: max_running", self.max_running, minimum=1)
        count("engine: max_queued", self.max_queued, minimum=0)
        whole("engine: max_queued_bytes", self.max_queued_bytes, minimum=0)
        count("engine: max_step_samples", self.max_step_samples, minimum=1)
        count("engine: max_batch", self.max_batch, minimum=1)
        if self.memory_limit is not None:
            whole("engine: memory_limit", self.memory_limit, minimum=1)
