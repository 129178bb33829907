"""A request on its way through the engine, as its owner sees it."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias, final

import numpy as np

from ..core.report import StepRecord
from ..core.request import GenerationRequest
from ..core.validation import whole
from ..errors import MaxDiffusionError, RequestError
from ..pipelines.outputs import GenerationResult

MAX_PRIORITY: Final = 8
MAX_PREVIEWS: Final = 100


class QueueFullError(MaxDiffusionError):
    """As many requests wait as may; the caller may try again later. HTTP 429.

    Args:
        message: What the error says.
        retry_after: Seconds until there may be room.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds until there may be room."""


class DeadlineError(MaxDiffusionError):
    """The request was not done in the time it was given. HTTP 504."""


class EngineStoppedError(MaxDiffusionError):
    """The engine takes no more requests. HTTP 503."""


class State(Enum):
    """Where a request stands."""

    QUEUED = "queued"
    """The request waits for memory or a place."""
    RUNNING = "running"
    """The request is encoded, takes steps, or is decoded."""
    FINISHED = "finished"
    """The request has its pictures."""
    FAILED = "failed"
    """The request has none, for an error or a deadline."""
    CANCELLED = "cancelled"
    """The request has none, since someone cancelled it."""


@dataclass(frozen=True)
class Started:
    """The request has left the queue."""


@dataclass(frozen=True)
class StepTaken:
    """A denoising step of the request is done."""

    step: int
    """Number of steps taken, from 1."""
    num_steps: int
    """Number of steps in all."""
    records: tuple[StepRecord, ...]
    """What the step did, one record for each guidance branch."""


@dataclass(frozen=True)
class Preview:
    """What the pictures will be, as far as is known after some step."""

    step: int
    """Number of steps taken, from 1."""
    index: int
    """Place among this request's previews, from 0."""
    frames: np.ndarray
    """uint8 ``(B, F, H, W, 3)``; an image is one frame."""


@dataclass(frozen=True)
class Finished:
    """The request has its pictures; its last event."""

    result: GenerationResult
    """The pictures and the report."""


@dataclass(frozen=True)
class Failed:
    """The request will have no pictures; its last event."""

    error: MaxDiffusionError
    """Why there are none."""


Event: TypeAlias = Started | StepTaken | Preview | Finished | Failed
Listener: TypeAlias = Callable[[Event], None]


@dataclass(frozen=True)
class SubmitOptions:
    """How the engine treats a request, beside what is drawn.

    Attributes:
        priority: -8 to 8. Higher ones leave the queue first, however long others have
            waited, and get twice the share of steps for each level when there are more
            requests than fit in a turn.
        timeout: Seconds from submission to the result; ``None`` for no limit.
        num_previews: Number of previews to emit on the way, 0 to 100, spread evenly;
            fewer where others wait to begin or to end.
        emits_steps: Whether a :class:`StepTaken` is emitted for every step.

    Raises:
        RequestError: A value is of the wrong type or out of range.
    """

    priority: int = 0
    timeout: float | None = None
    num_previews: int = 0
    emits_steps: bool = True

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not isinstance(self.emits_steps, bool):
            raise RequestError(
                f"engine: emits_steps must be True or False, got {self.emits_steps!r}"
            )
        whole_priority = type(self.priority) is int
        if not whole_priority or abs(self.priority) > MAX_PRIORITY:
            raise RequestError(
                f"engine: priority must be -{MAX_PRIORITY} to {MAX_PRIORITY}, "
                f"got {self.priority!r}"
            )
        timeout = self.timeout
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if timeout is not None and not (is_number and 0 < timeout < math.inf):
            raise RequestError(
                f"engine: timeout must be a number of seconds above 0, got {timeout!r}"
            )
        whole(
            "engine: num_previews", self.num_previews, minimum=0, maximum=MAX_PREVIEWS
        )


@final
class RequestHandle:
    """A submitted request: its progress, its result, and the way to stop it.

    Every method may be called from any thread.

    Args:
        identifier: Its name, which no other request has.
        request: What is drawn, without its pictures.
        cancel: Has the engine stop it.
        listener: Called with every event, if its owner gave one.
    """

    def __init__(
        self,
        identifier: str,
        request: GenerationRequest,
        cancel: Callable[[RequestHandle], None],
        listener: Listener | None,
    ) -> None:
        self.id = identifier
        """Its name, which no other request has."""
        self.request = request
        """What is drawn; without its pictures, which the engine lets go of once they
        are scaled."""
        self._cancel = cancel
        self._listener = listener
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._done = threading.Event()
        self._state = State.QUEUED
        self._last: Finished | Failed | None = None

    @property
    def state(self) -> State:
        """Where the request stands."""
        return self._state

    def cancel(self) -> None:
        """Stops the request before its next step; no effect on one that is done."""
        self._cancel(self)

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """All events in order, the last one :class:`Finished` or :class:`Failed`.

        For one reader; a request submitted with a listener has none.

        Args:
            timeout: Longest wait for the next one, in seconds; ``None`` for no limit.

        Raises:
            TimeoutError: None came in that time.
        """
        if self._listener is not None:
            raise MaxDiffusionError(
                "request: its events go to the listener it was submitted with"
            )
        event: Event | None = None
        while not isinstance(event, Finished | Failed):
            if self._done.is_set() and self._events.empty():
                return  # who has read them before has had the last one
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(
                    f"request {self.id}: no event in {timeout} s"
                ) from None
            yield event

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Waits for the pictures.

        Args:
            timeout: Longest wait, in seconds; ``None`` for no limit.

        Raises:
            MaxDiffusionError: Why there are none; ``RequestCancelled`` after a cancel.
            TimeoutError: They are not there after ``timeout`` seconds.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"request {self.id}: not done after {timeout} s")
        if isinstance(self._last, Failed):
            raise self._last.error
        assert self._last is not None
        return self._last.result

    def emit(self, event: Event, state: State) -> None:
        """Gives the owner an event; only the engine calls it.

        Args:
            event: What has happened.
            state: Where the request stands from now on.
        """
        self._state = state
        if isinstance(event, Finished | Failed):
            self._last = event
            self._done.set()
        if self._listener is None:
            self._events.put(event)
        else:
            self._listener(event)
