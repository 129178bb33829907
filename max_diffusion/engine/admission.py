"""Who waits, who runs, and who must leave: the part of the engine under its lock."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Final, final

from ..core.request import GenerationContext
from ..errors import MaxDiffusionError, RequestCancelled
from .config import EngineConfig
from .fairness import start_beside
from .job import Job
from .memory import MemoryPlan, Needed
from .observer import EngineStats
from .requests import DeadlineError, QueueFullError, RequestHandle, SubmitOptions

# A new figure has this weight in the running mean.
_WEIGHT: Final = 0.2


@final
@dataclass(frozen=True)
class Changes:
    """What has changed since the executor last looked."""

    ended: list[tuple[Job, MaxDiffusionError]]
    """Requests that were cancelled or are late, and no longer run or wait, with why."""
    started: list[Job]
    """Requests that have been given a slot."""


@final
class Admission:
    """The requests that wait and those that run, and the memory plan they run in.

    Any thread may call :meth:`add`, :meth:`cancel`, :meth:`cancel_all`, :meth:`close`
    and :meth:`stats`; the rest is the executor's.

    Args:
        config: Limits.
        plan: Slots for requests; it is used under the lock only.
    """

    def __init__(self, config: EngineConfig, plan: MemoryPlan) -> None:
        self.lock = threading.Condition()
        """It guards all below, and the executor waits on it. A thread that has it may
        take it again."""
        self.running: list[Job] = []
        """Requests that hold a slot. The executor may read it without the lock."""
        self.is_closing = False
        """Whether no more requests are taken."""
        self._config = config
        self._plan = plan
        self._waiting: list[Job] = []
        # Of the running ones, those that the executor has not seen.
        self._admitted: list[Job] = []
        self._order = 0
        self._cache_bytes = 0
        self._seconds_per_request = 1.0
        self._last_finish = time.monotonic()

    def stats(self) -> EngineStats:
        """How many requests wait and run now, and the bytes they hold."""
        with self.lock:
            return EngineStats(
                queued=len(self._waiting),
                running=len(self.running),
                reserved_bytes=self._plan.reserved,
                memory_limit=self._plan.limit,
                lora_bytes=self._plan.loaded_lora_bytes,
                cache_bytes=self._cache_bytes,
            )

    def add(
        self,
        handle: RequestHandle,
        context: GenerationContext,
        options: SubmitOptions,
        needed: Needed,
    ) -> None:
        """Gives a request a slot, or a place in the queue.

        Raises:
            QueueFullError: Too many requests wait, or too many bytes of them.
        """
        with self.lock:
            self._order += 1
            now = time.monotonic()
            job = Job(handle, context, options, needed, self._order, now)
            if not self._waiting and self._let_in(job):
                self.lock.notify()
                return
            self._check_queue(context.num_bytes)
            self._waiting.append(job)
            self._waiting.sort(key=lambda job: (-job.options.priority, job.order))

    def cancel(self, handle: RequestHandle) -> None:
        """Has a request end before its next step; one that is done is let be."""
        with self.lock:
            for job in (*self._waiting, *self.running):
                if job.handle is handle:
                    job.is_cancelled = True
                    self.lock.notify()

    def cancel_all(self) -> None:
        """Has every request there is end before its next step."""
        with self.lock:
            for job in (*self._waiting, *self.running):
                job.is_cancelled = True
            self.lock.notify()

    def close(self) -> None:
        """Takes no more requests; the executor ends when none is left."""
        with self.lock:
            self.is_closing = True
            self.lock.notify()

    def next_changes(self) -> Changes | None:
        """Lets requests out and in; waits for a change where there is nothing to do.

        Returns:
            Those that left and came, which may be none; ``None`` at the end.
        """
        with self.lock:
            self.count_cache_bytes()
            changes = Changes(self._take_ended(time.monotonic()), self._admit())
            is_idle = not self.running and not changes.ended
            if is_idle and not self._waiting and self.is_closing:
                return None
            if is_idle:
                self.lock.wait()
        return changes

    def release(self, job: Job) -> None:
        """Frees a running request's slot."""
        with self.lock:
            self.running.remove(job)
            self._plan.free(job.needed)

    def abandon(self) -> list[Job]:
        """Takes out all requests there are, and takes no more."""
        with self.lock:
            jobs = [*self._waiting, *self.running]
            self._waiting, self.running, self._admitted = [], [], []
            self._plan.clear()
            self._cache_bytes = 0
            self.is_closing = True
        return jobs

    def room_to_decode(self) -> int:
        """Bytes that no slot holds now."""
        with self.lock:
            return self._plan.room_to_decode

    def count_cache_bytes(self) -> None:
        """Counts the bytes of cache state that running requests hold now."""
        held = sum(job.denoising.held_bytes for job in self.running if job.denoising)
        with self.lock:
            self._cache_bytes = held

    def note_finish(self, job: Job, now: float) -> None:
        """Keeps how many seconds a request takes, which tells who is refused to wait.

        Args:
            job: One that has got its pictures.
            now: Seconds of ``time.monotonic()``.
        """
        # Time in which there was nothing to do does not count.
        taken = now - max(self._last_finish, job.submitted)
        self._seconds_per_request += _WEIGHT * (taken - self._seconds_per_request)
        self._last_finish = now

    def _take_ended(self, now: float) -> list[tuple[Job, MaxDiffusionError]]:
        """Takes out what is cancelled or late, wherever it stands."""
        ended: list[tuple[Job, MaxDiffusionError]] = []
        for jobs in (self._waiting, self.running):
            for job in list(jobs):
                error: MaxDiffusionError
                if job.is_cancelled:
                    error = RequestCancelled(f"request {job.handle.id}: cancelled")
                elif now > job.deadline:
                    error = DeadlineError(
                        f"request {job.handle.id}: not done after its "
                        f"{job.options.timeout:g} s; give it more time, or ask for "
                        "fewer steps"
                    )
                else:
                    continue
                jobs.remove(job)
                if jobs is self.running:
                    self._plan.free(job.needed)
                ended.append((job, error))
        return ended

    def _admit(self) -> list[Job]:
        """Lets requests in, strictly in order; returns those that have come in.

        A small one does not pass a large one, which would otherwise wait for as long
        as small ones come.
        """
        while self._waiting and self._let_in(self._waiting[0]):
            self._waiting.pop(0)
        admitted, self._admitted = self._admitted, []
        return [job for job in admitted if job in self.running]

    def _check_queue(self, num_bytes: int) -> None:
        """Refuses a request of so many bytes where no more may wait."""
        count, config = len(self._waiting), self._config
        held = sum(job.context.num_bytes for job in self._waiting)
        reason = ""
        if count >= config.max_queued:
            reason = f"at most {config.max_queued} may"
        elif count and held + num_bytes > config.max_queued_bytes:
            reason = (
                f"with {held} bytes of noise and pictures, at most "
                f"{config.max_queued_bytes} may, and this one has {num_bytes}"
            )
        if reason:
            raise QueueFullError(
                f"engine: {count} requests wait already, {reason}; try again later",
                retry_after=max(1.0, self._seconds_per_request),
            )

    def _let_in(self, job: Job) -> bool:
        """Gives a request a slot, if there is one."""
        if len(self.running) >= self._config.max_running:
            return False
        if not self._plan.reserve(job.needed):
            return False
        start_beside(self.running, job)
        self.running.append(job)
        self._admitted.append(job)
        return True
