"""The engine: many requests on one device, batched step by step."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Final, Self, final

import numpy as np
from max.driver import Buffer

from ..caches import cache_name
from ..calls import Routine
from ..checks import count, whole
from ..compile import check_not_forked, memory_errors_said
from ..errors import MaxDiffusionError, RequestCancelled, RequestError
from ..loop import Denoising
from ..pipeline import DiffusionPipelineOutput
from ..text_to_image import GenerationResult, TextToImagePipeline
from ..types import GenerationContext, GenerationRequest
from .batching import Batcher
from .memory import MemoryPlan, Needed, default_memory_limit
from .observer import EngineObserver, EngineStats, TickRecord
from .requests import (
    DeadlineError,
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    Listener,
    Preview,
    QueueFullError,
    RequestHandle,
    Started,
    State,
    StepTaken,
    SubmitOptions,
)
from .shared import SharedInputs

logger = logging.getLogger(__name__)

# Of a new figure in a running mean.
_SHARE: Final = 0.2
_MAX_STEPS_PER_TURN: Final = 16


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_running: Most requests that hold memory at a time.
        max_queued: Most requests that wait; one more is refused.
        max_step_samples: Most pictures that take a step in one turn; more take turns.
        max_batch: Most pictures in one execution of a graph, but for a request that
            has more of its own. On two CPU cores the demo model is fastest with 8:
            3.0 ms a picture, against 5.3 alone.
        memory_limit: Bytes for all that running requests hold, and for decoding one
            picture at a time at least; ``None`` for half of what is free at the
            start.
    """

    max_running: int = 64
    max_queued: int = 256
    max_step_samples: int = 16
    max_batch: int = 8
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        count("engine: max_running", self.max_running, minimum=1)
        count("engine: max_queued", self.max_queued, minimum=0)
        count("engine: max_step_samples", self.max_step_samples, minimum=1)
        count("engine: max_batch", self.max_batch, minimum=1)
        if self.memory_limit is not None:
            whole("engine: memory_limit", self.memory_limit, minimum=1)


@final
@dataclass(eq=False)
class _Job:
    """A request inside of the engine."""

    handle: RequestHandle
    context: GenerationContext
    options: SubmitOptions
    needed: Needed
    """Its slot."""
    cache: str
    """Its name."""
    order: int
    """Of submission."""
    submitted: float
    """``time.monotonic()``."""
    denoising: Denoising | None = None
    """From the end of encoding to the start of decoding."""
    preview_steps: tuple[int, ...] = ()
    used: float = 0.0
    """Share of the device it has had, in weighted samples x tokens."""
    is_cancelled: bool = False
    encoded: float = 0.0
    """``time.monotonic()`` of its first step."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def deadline(self) -> float:
        """``time.monotonic()`` at which it is late."""
        timeout = self.options.timeout
        return math.inf if timeout is None else self.submitted + timeout


@final
class Engine:
    """Draws the pictures of many requests at once on one device.

    One thread runs the device. In every turn each request takes one step: its cache
    decides what that is, and whatever several of them need is run once for all. So
    requests of any size, cache and number of steps run side by side, and begin and end
    between any two steps. A request's picture and its cache's decisions are those it
    gets alone.

    Where more pictures run than fit in a turn (``max_step_samples``), those that had
    the smallest share of the device go first, so that no request starves another; a
    turn takes as long as its largest pictures do.
    Encoding and decoding happen between turns, for about half as long as a turn takes,
    or one at a time where one takes longer; previews where nothing else waits.

    Use it as a context manager, or :meth:`close` it.

    Args:
        pipeline: A loaded pipeline. The engine's thread is the only one to run it.
        config: Limits.
        observer: Is told of every turn.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        config: EngineConfig | None = None,
        *,
        observer: EngineObserver | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.config = config or EngineConfig()
        limit = self.config.memory_limit
        limit = default_memory_limit(pipeline.device) if limit is None else limit
        self._observer = observer or EngineObserver()
        self._plan = MemoryPlan(pipeline, limit)
        self._batcher = Batcher(pipeline.models, self.config.max_batch)
        self._shared = SharedInputs()
        # Guards all below; the executor's thread waits on it.
        self._changed = threading.Condition()
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        # Of the running ones, those that the executor has not seen.
        self._admitted: list[_Job] = []
        self._is_closing = False
        self._order = 0
        self._cache_bytes = 0
        self._seconds_per_request = 1.0
        # The executor's own.
        self._side_jobs: deque[tuple[_Job, Callable[[], None]]] = deque()
        # The newest of each request: one that nobody got to in time is left out.
        self._previews: dict[_Job, Callable[[], None]] = {}
        # A fork has neither the thread nor whoever might hold the lock.
        self._process = os.getpid()
        self._seconds_per_tick = 0.0
        self._last_end = time.monotonic()
        self._thread = threading.Thread(
            target=self._work, name="max-diffusion-engine", daemon=True
        )
        self._thread.start()
        # A thread that is inside of MAX when Python ends would bring it down.
        atexit.register(self._close_at_exit)

    def _close_at_exit(self) -> None:
        self.close(drain=False)

    def __enter__(self) -> Self:
        """The running engine."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finishes what was submitted; after an error, cancels it."""
        self.close(drain=kind is None)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._is_closing

    def stats(self) -> EngineStats:
        """How it stands now."""
        with self._changed:
            return EngineStats(
                queued=len(self._waiting),
                running=len(self._running),
                reserved_bytes=self._plan.reserved,
                memory_limit=self._plan.limit,
                cache_bytes=self._cache_bytes,
            )

    def submit(
        self,
        request: GenerationRequest,
        options: SubmitOptions | None = None,
        *,
        listener: Listener | None = None,
    ) -> RequestHandle:
        """Puts a request in the queue; never waits.

        Args:
            request: What to draw.
            options: Priority, deadline, previews.
            listener: Called with every event, on the engine's thread: it must be quick.
                Without one, read :meth:`RequestHandle.events`.

        Raises:
            RequestError: A value is malformed or out of range, or the request needs
                more memory than there is.
            QueueFullError: Too many requests wait.
            EngineStoppedError: The engine is closing.
            DeviceError: This process is a fork of the engine's.
        """
        check_not_forked(self._process)
        options = options or SubmitOptions()
        if not isinstance(request, GenerationRequest):
            raise RequestError(
                f"engine: expected a GenerationRequest, got {type(request).__name__}"
            )
        options.check()
        with memory_errors_said():
            context = self.pipeline.create_context(request)
        needed = self._plan.needed_by(context)
        cache = self.pipeline.resolve_cache(context.cache or self.pipeline.cache_config)
        handle = RequestHandle(uuid.uuid4().hex, request, self._cancel, listener)
        with self._changed:
            if not self.is_alive:
                raise EngineStoppedError(
                    "engine: it is closing and takes no more requests; ask another"
                )
            self._order += 1
            name, now = cache_name(cache), time.monotonic()
            job = _Job(handle, context, options, needed, name, self._order, now)
            if not self._waiting and self._let_in(job):
                self._changed.notify()
                return handle
            if len(self._waiting) >= self.config.max_queued:
                raise QueueFullError(
                    f"engine: {len(self._waiting)} requests wait already, at most "
                    f"{self.config.max_queued} may; try again later",
                    retry_after=max(1.0, self._seconds_per_request),
                )
            self._waiting.append(job)
            self._waiting.sort(key=lambda job: (-job.options.priority, job.order))
        return handle

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and ends.

        Args:
            drain: Finish what was submitted; otherwise it is cancelled.
            timeout: Seconds to drain; what is left then is cancelled.

        In a fork it does nothing: the engine runs on in the process that it is of.
        """
        if os.getpid() != self._process:
            return
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if drain:
            self._thread.join(timeout)
        self.cancel_all()
        self._thread.join()
        atexit.unregister(self._close_at_exit)

    def cancel_all(self) -> None:
        """Cancels every request there is."""
        with self._changed:
            for job in (*self._waiting, *self._running):
                job.is_cancelled = True
            self._changed.notify()

    # Below, everything but _cancel and _let_in runs on the executor's thread.

    def _cancel(self, handle: RequestHandle) -> None:
        with self._changed:
            for job in (*self._waiting, *self._running):
                if job.handle is handle:
                    job.is_cancelled = True
                    self._changed.notify()

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                self._run_side_jobs()
                self._tick()
        except BaseException as err:
            # A defect of the engine itself: nothing is known of any request any more.
            logger.exception("the engine has failed")
            failure = MaxDiffusionError(f"engine: it has failed and stopped: {err}")
            with self._changed:
                jobs = [*self._waiting, *self._running]
                self._waiting, self._running, self._admitted = [], [], []
                self._plan.clear()
                self._cache_bytes = 0
                self._is_closing = True
            for job in jobs:
                self._tell(job, Failed(failure), State.FAILED)

    def _wait_for_work(self) -> bool:
        """Lets requests out and in; waits until one runs. False at the end."""
        while True:
            with self._changed:
                now = time.monotonic()
                ended = self._take_ended(now)
                started = self._admit()
                is_idle = not self._running and not ended
                if is_idle and not self._waiting and self._is_closing:
                    return False
                if is_idle:
                    self._changed.wait()
            for job, error in ended:
                self._end(job, Failed(error))
            for job in started:
                self._tell(job, Started())
                self._side_jobs.append((job, partial(self._encode, job)))
            if self._running:
                return True

    def _take_ended(self, now: float) -> list[tuple[_Job, MaxDiffusionError]]:
        """Takes out what is cancelled or late, wherever it stands."""
        ended: list[tuple[_Job, MaxDiffusionError]] = []
        for jobs in (self._waiting, self._running):
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
                if jobs is self._running:
                    self._plan.free(job.needed)
                ended.append((job, error))
        return ended

    def _let_in(self, job: _Job) -> bool:
        """Gives a request a slot, if there is one."""
        if len(self._running) >= self.config.max_running:
            return False
        if not self._plan.reserve(job.needed):
            return False
        # As if it had run all along: neither ahead of the others nor behind.
        job.used = min((other.used for other in self._running), default=0.0)
        self._running.append(job)
        self._admitted.append(job)
        return True

    def _admit(self) -> list[_Job]:
        """Lets requests in, strictly in order; returns those that have come in.

        A small one does not pass a large one, which would otherwise wait for as long
        as small ones come.
        """
        while self._waiting and self._let_in(self._waiting[0]):
            self._waiting.pop(0)
        admitted, self._admitted = self._admitted, []
        return [job for job in admitted if job in self._running]

    def _run_side_jobs(self) -> None:
        """Encodes and decodes for about half as long as a turn takes, or one thing."""
        started = time.perf_counter()
        while self._side_jobs or self._previews:
            if self._side_jobs:
                job, action = self._side_jobs.popleft()
            else:  # only if nobody waits to begin or to end
                job = next(iter(self._previews))
                action = self._previews.pop(job)
            if job in self._running:
                self._guarded(job, action)
            spent = time.perf_counter() - started
            has_steps = any(job.denoising is not None for job in self._running)
            if has_steps and spent >= self._seconds_per_tick / 2:
                break
        seconds = time.perf_counter() - started
        if seconds:
            self._observe(partial(self._observer.on_side, seconds))

    def _guarded(self, job: _Job, action: Callable[[], None]) -> None:
        """Runs an action of one job; its error ends that job alone."""
        try:
            action()
        except Exception as err:
            self._fail(job, err)

    def _encode(self, job: _Job) -> None:
        started = time.perf_counter()
        inputs = self.pipeline.prepare_inputs(job.context)
        denoising = self.pipeline.encode(inputs)
        self._shared.share(self.pipeline, denoising)
        steps, previews = denoising.schedule.num_steps, job.options.num_previews
        job.preview_steps = tuple(
            step
            for step in range(1, steps)
            if (step - 1) * (previews + 1) // steps < step * (previews + 1) // steps
        )
        job.denoising, job.encoded = denoising, time.monotonic()
        job.seconds["encode"] = time.perf_counter() - started

    def _tick(self) -> None:
        """One step of every request whose turn it is."""
        started = time.perf_counter()
        chosen = self._choose()
        if not chosen:
            return
        actions: dict[str, Counter[str]] = {}
        turns = [self._turn(job, denoising, actions) for job, denoising in chosen]
        for (job, denoising), lane in zip(
            chosen, self._batcher.run(turns), strict=True
        ):
            if lane.error is not None:
                self._fail(job, lane.error)
            elif denoising.is_done:
                job.denoising = None
                job.seconds["denoise"] = time.monotonic() - job.encoded
                self._side_jobs.append((job, partial(self._decode, job, denoising)))
        self._count_cache_bytes()
        seconds = time.perf_counter() - started
        self._seconds_per_tick += _SHARE * (seconds - self._seconds_per_tick)
        batches = self._batcher.record
        record = TickRecord(
            seconds=seconds,
            graph_seconds=batches.graph_seconds,
            requests=len(chosen),
            samples=sum(denoising.batch for _, denoising in chosen),
            batches=tuple(batches.batches),
            actions=actions,
        )
        self._observe(partial(self._observer.on_tick, record))

    def _choose(self) -> list[tuple[_Job, Denoising]]:
        """Whose turn it is: those that had least of the device, as many as fit."""
        ready = [
            (job, job.denoising)
            for job in sorted(self._running, key=lambda job: (job.used, job.order))
            if job.denoising is not None
        ]
        chosen: list[tuple[_Job, Denoising]] = []
        samples = 0
        for job, denoising in ready:
            if chosen and samples + denoising.batch > self.config.max_step_samples:
                break
            samples += denoising.batch
            chosen.append((job, denoising))
            work = denoising.latents.shape[1] * denoising.batch * len(denoising.states)
            job.used += float(work) / 2.0**job.options.priority
        # In one order, so that the same rows meet at the next graph.
        return sorted(chosen, key=lambda pair: pair[0].order)

    def _turn(
        self, job: _Job, denoising: Denoising, actions: dict[str, Counter[str]]
    ) -> Routine[None]:
        """A step, and those before it that take nothing of the transformer.

        They take next to no time, and all that take turns meet at one that computes.
        """
        counter = actions.setdefault(job.cache, Counter())
        for _ in range(_MAX_STEPS_PER_TURN):
            yield from denoising.advance()
            records = denoising.records[-len(denoising.branches) :]
            for record in records:
                counter.update(record.actions)
            steps = denoising.schedule.num_steps
            if job.options.tells_steps:
                self._tell(job, StepTaken(denoising.step, steps, tuple(records)))
            if denoising.step in job.preview_steps:
                yield from self._plan_preview(job, denoising)
            if job.is_cancelled or denoising.is_done or not denoising.is_skipped:
                return

    def _plan_preview(self, job: _Job, denoising: Denoising) -> Routine[None]:
        latents, done = (yield from denoising.preview()), denoising.step
        index = job.preview_steps.index(done)

        def preview() -> None:
            images = self._pictures(job, latents)
            self._tell(job, Preview(done, index, images))

        self._previews.pop(job, None)  # to the end of the line
        self._previews[job] = preview

    def _decode(self, job: _Job, denoising: Denoising) -> None:
        started = time.perf_counter()
        denoised = self.pipeline.finish(denoising)
        images = self._pictures(job, denoised.latents)
        job.seconds["decode"] = time.perf_counter() - started
        output = DiffusionPipelineOutput(
            images, denoised.steps, denoised.cache_bytes, job.seconds
        )
        report = self.pipeline.report(
            job.handle.request, job.context, output, time.monotonic() - job.submitted
        )
        self._release(job)
        self._end(job, Finished(GenerationResult(images, report)))

    def _pictures(self, job: _Job, latents: Buffer) -> np.ndarray:
        """Latents to uint8 ``(B, H, W, 3)``, in the room that there is now."""
        with self._changed:
            room = self._plan.room_to_decode
        return self.pipeline.decode_in_goes(job.context, latents, room)

    def _fail(self, job: _Job, error: Exception) -> None:
        failure = _said(error)
        if failure is not error:
            logger.error("request %s has failed", job.handle.id, exc_info=error)
        self._release(job)
        self._end(job, Failed(failure))

    def _observe(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception:
            logger.exception("the observer has failed")

    def _count_cache_bytes(self) -> None:
        held = sum(job.denoising.held_bytes for job in self._running if job.denoising)
        with self._changed:
            self._cache_bytes = held

    def _release(self, job: _Job) -> None:
        """Frees a running request's slot."""
        with self._changed:
            self._running.remove(job)
            self._plan.free(job.needed)

    def _end(self, job: _Job, event: Finished | Failed) -> None:
        """The last event of a request, which is no longer in any list."""
        job.denoising = None
        self._previews.pop(job, None)
        self._count_cache_bytes()
        now = time.monotonic()
        state = State.FINISHED
        if isinstance(event, Failed):
            is_cancelled = isinstance(event.error, RequestCancelled)
            state = State.CANCELLED if is_cancelled else State.FAILED
        else:
            # Time in which there was nothing to do does not count.
            taken = now - max(self._last_end, job.submitted)
            self._seconds_per_request += _SHARE * (taken - self._seconds_per_request)
            self._last_end = now
        self._observe(partial(self._observer.on_end, state, now - job.submitted))
        self._tell(job, event, state)

    def _tell(self, job: _Job, event: Event, state: State = State.RUNNING) -> None:
        try:
            job.handle.tell(event, state)
        except BaseException:
            # The listener is its owner's; the pictures of all others are not.
            logger.exception("the listener of request %s has failed", job.handle.id)
            job.is_cancelled = True


def _said(error: Exception) -> MaxDiffusionError:
    """The error itself if it is one of this package's, else one that tells of it."""
    try:
        with memory_errors_said():
            raise error
    except MaxDiffusionError as known:
        return known
    except Exception:
        kind = type(error).__name__
        failure = MaxDiffusionError(f"engine: a step has failed: {kind}: {error}")
        failure.__cause__ = error
        return failure
