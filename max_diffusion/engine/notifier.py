"""Tells listeners and the observer what happens, and outlives their errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import final

from .job import Job
from .observer import EngineObserver, TurnRecord
from .requests import Event, State

logger = logging.getLogger(__name__)


@final
class Notifier:
    """Emits the events of requests, and passes figures on to the observer.

    Args:
        observer: Is told of the engine's work; an error of its own is logged.
    """

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer

    def emit(self, job: Job, event: Event, state: State = State.RUNNING) -> None:
        """Gives a request's owner an event; a listener that raises cancels its request.

        Args:
            job: Whose event it is.
            event: What has happened.
            state: Where the request stands from now on.
        """
        try:
            job.handle.emit(event, state)
        except BaseException:
            # The listener is its owner's; the pictures of all others are not.
            logger.exception("the listener of request %s has failed", job.handle.id)
            job.is_cancelled = True

    def turn_is_over(self, record: TurnRecord) -> None:
        """Tells the observer of a turn."""
        self._guarded(partial(self._observer.on_turn, record))

    def side_jobs_are_over(self, seconds: float) -> None:
        """Tells the observer of the seconds between two turns."""
        self._guarded(partial(self._observer.on_side_jobs, seconds))

    def request_is_over(self, state: State, seconds: float) -> None:
        """Tells the observer how a request ended, in seconds since its submission."""
        self._guarded(partial(self._observer.on_end, state, seconds))

    def _guarded(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception:
            logger.exception("the observer has failed")
