"""What is done between turns: encoding, decoding and previews."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import final

import numpy as np
from max.driver import Buffer

from ..denoising.loop import Denoising
from ..execution.graph_call import Routine
from ..pipelines.decoding import decode_gradually
from ..pipelines.outputs import DiffusionPipelineOutput, GenerationResult
from ..pipelines.reporting import report_of
from ..pipelines.text_to_image import TextToImagePipeline
from .admission import Admission
from .interned_inputs import intern_inputs
from .job import Job
from .notifier import Notifier
from .requests import Preview


@final
@dataclass(frozen=True)
class _Work:
    """What is to be done for a request."""

    job: Job
    action: Iterator[None]
    """Stops where something else may be done before it goes on."""
    is_encoding: bool = False

    @property
    def may_pass(self) -> bool:
        """Whether it may be done while another request is half decoded.

        The plan has room for one decoding, or one encoding of a picture, at a time.
        """
        return self.is_encoding and self.job.context.given is None


@final
class SideJobs:
    """Encodes prompts and decodes pictures, in the order in which they came up.

    All of it runs on the executor's thread. Videos are decoded in parts, and between
    them prompts of others are encoded and steps taken.

    Args:
        pipeline: What encodes and decodes.
        admission: Tells who still runs, and the room there is to decode.
        notifier: Emits previews.
        finish: Is given a request's result; it ends the request.
        fail: Is given the error of a request's side job; it ends the request.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        admission: Admission,
        notifier: Notifier,
        *,
        finish: Callable[[Job, GenerationResult], None],
        fail: Callable[[Job, Exception], None],
    ) -> None:
        self.previews: dict[Job, Iterator[None]] = {}
        """The newest preview of each request that waits for one, in the order in which
        they are drawn: one that nobody got to in time is left out."""
        self._pipeline = pipeline
        self._admission = admission
        self._notifier = notifier
        self._finish, self._fail = finish, fail
        self._queue: deque[_Work] = deque()
        # Text encoders that are in memory for as long as texts wait for them.
        self._encoders = ExitStack()
        self._begun: _Work | None = None
        """A decoding that has stopped between two parts."""

    def add_encoding(self, job: Job) -> None:
        """Puts the encoding of a request's prompts in the queue."""
        self._queue.append(_Work(job, self._encode(job), is_encoding=True))

    def add_decoding(self, job: Job, denoising: Denoising) -> None:
        """Puts the decoding of a request's pictures in the queue.

        Args:
            job: Whose pictures they are.
            denoising: Its loop, with all steps taken.
        """
        self._queue.append(_Work(job, self._decode(job, denoising)))

    def add_preview(self, job: Job, denoising: Denoising) -> Routine[None]:
        """Estimates the clean latents now, and decodes them where nothing else waits.

        Args:
            job: Whose preview it is.
            denoising: Its loop, after one of the job's preview steps.
        """
        latents, done = (yield from denoising.preview()), denoising.step
        index = job.preview_steps.index(done)

        def preview() -> Iterator[None]:
            frames = yield from self._frames(job, latents)
            self._notifier.emit(job, Preview(done, index, frames))

        self.previews.pop(job, None)  # to the end of the line
        self.previews[job] = preview()

    def drop(self, job: Job) -> None:
        """Leaves out what is to be done for a request that is over.

        An idle engine would hold its latents, cache state and half a video until
        another one comes.
        """
        self.previews.pop(job, None)
        self._queue = deque(work for work in self._queue if work.job is not job)
        if self._begun is not None and self._begun.job is job:
            self._begun = None

    def run(self, seconds_per_turn: float) -> None:
        """Encodes and decodes for about half as long as a turn takes, or one thing.

        Where no request has a step to take, all of it is done; of what is decoded in
        parts one part.

        Args:
            seconds_per_turn: Seconds that a turn takes.
        """
        with ExitStack() as self._encoders:
            self._run(seconds_per_turn)

    def _run(self, seconds_per_turn: float) -> None:
        running = self._admission.running
        started = time.perf_counter()
        while (work := self._next()) is not None:
            if work.job in running and self._goes_on(work):
                self._begun = work
                break  # others may have come, or may leave
            spent = time.perf_counter() - started
            has_steps = any(job.denoising is not None for job in running)
            if has_steps and spent >= seconds_per_turn / 2 and not self._must_encode():
                break
        seconds = time.perf_counter() - started
        if seconds:
            self._notifier.side_jobs_are_over(seconds)

    def _must_encode(self) -> bool:
        """Whether texts wait for encoders that would leave before the next turn."""
        offloads = self._pipeline.graphs.offloads_text_encoders
        return offloads and any(work.is_encoding for work in self._queue)

    def _goes_on(self, work: _Work) -> bool:
        """Does a part of some work, and tells whether there is more.

        Its error ends its own request alone.
        """
        try:
            next(work.action)
        except StopIteration:
            return False
        except Exception as err:
            self._fail(work.job, err)
            return False
        return True

    def _next(self) -> _Work | None:
        """Takes what is to be done next, if anything is."""
        if self._begun is not None:
            passing = next((work for work in self._queue if work.may_pass), None)
            if passing is not None:
                self._queue.remove(passing)
                return passing
            work, self._begun = self._begun, None
            return work
        if self._queue:
            return self._queue.popleft()
        if self.previews:  # only if nobody waits to begin or to end
            job = next(iter(self.previews))
            return _Work(job, self.previews.pop(job))
        return None

    def _encode(self, job: Job) -> Iterator[None]:
        yield from ()  # all of it at once
        started = time.perf_counter()
        # Sets of LoRAs that no request needs now make way; the plan has room for all
        # that are needed.
        self._pipeline.adapters.make_room(
            [running.context.loras for running in self._admission.running]
        )
        self._encoders.enter_context(self._pipeline.graphs.text_encoders())
        inputs = self._pipeline.prepare_inputs(job.context)
        denoising = self._pipeline.encode(inputs)
        loops = [running.denoising for running in self._admission.running]
        intern_inputs(self._pipeline, denoising, [loop for loop in loops if loop])
        steps, previews = denoising.schedule.num_steps, job.options.num_previews
        job.preview_steps = tuple(
            step
            for step in range(1, steps)
            if (step - 1) * (previews + 1) // steps < step * (previews + 1) // steps
        )
        job.denoising, job.encoded = denoising, time.monotonic()
        job.seconds["encode"] = time.perf_counter() - started

    def _decode(self, job: Job, denoising: Denoising) -> Iterator[None]:
        started, spent = time.perf_counter(), 0.0
        denoised = self._pipeline.finish(denoising)
        decoding = self._frames(job, denoised.latents)
        while True:
            try:
                next(decoding)
            except StopIteration as end:
                frames: np.ndarray = end.value
                break
            spent += time.perf_counter() - started
            yield  # in which others take their time
            started = time.perf_counter()
        job.seconds["decode"] = spent + time.perf_counter() - started
        output = DiffusionPipelineOutput(
            frames, denoised.steps, denoised.cache_bytes, job.seconds
        )
        report = report_of(
            self._pipeline,
            job.handle.request,
            job.context,
            output,
            time.monotonic() - job.submitted,
        )
        self._finish(job, GenerationResult(frames, report, job.context.fps))

    def _frames(self, job: Job, latents: Buffer) -> Generator[None, None, np.ndarray]:
        """Latents to uint8 ``(B, F, H, W, 3)``, in the room that there is now."""
        room = self._admission.room_to_decode()
        return decode_gradually(self._pipeline, job.context, latents, room)
