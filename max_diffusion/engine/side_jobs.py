"""What is done between turns: encoding, decoding and previews."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import final

import numpy as np
from max.driver import Buffer

from ..denoising.loop import Denoising
from ..execution.graph_call import Routine
from ..pipelines.decoding import decode_in_goes
from ..pipelines.outputs import DiffusionPipelineOutput, GenerationResult
from ..pipelines.reporting import report_of
from ..pipelines.text_to_image import TextToImagePipeline
from .admission import Admission
from .interned_inputs import InternedInputs
from .job import Job
from .notifier import Notifier
from .requests import Preview


@final
class SideJobs:
    """Encodes prompts and decodes pictures, in the order in which they came up.

    All of it runs on the executor's thread.

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
        self.previews: dict[Job, Callable[[], None]] = {}
        """The newest preview of each request that waits for one, in the order in which
        they are drawn: one that nobody got to in time is left out."""
        self._pipeline = pipeline
        self._admission = admission
        self._notifier = notifier
        self._finish, self._fail = finish, fail
        self._inputs = InternedInputs()
        self._queue: deque[tuple[Job, Callable[[], None]]] = deque()

    def add_encoding(self, job: Job) -> None:
        """Puts the encoding of a request's prompts in the queue."""
        self._queue.append((job, partial(self._encode, job)))

    def add_decoding(self, job: Job, denoising: Denoising) -> None:
        """Puts the decoding of a request's pictures in the queue.

        Args:
            job: Whose pictures they are.
            denoising: Its loop, with all steps taken.
        """
        self._queue.append((job, partial(self._decode, job, denoising)))

    def add_preview(self, job: Job, denoising: Denoising) -> Routine[None]:
        """Estimates the clean latents now, and decodes them where nothing else waits.

        Args:
            job: Whose preview it is.
            denoising: Its loop, after one of the job's preview steps.
        """
        latents, done = (yield from denoising.preview()), denoising.step
        index = job.preview_steps.index(done)

        def preview() -> None:
            frames = self._frames(job, latents)
            self._notifier.emit(job, Preview(done, index, frames))

        self.previews.pop(job, None)  # to the end of the line
        self.previews[job] = preview

    def drop_preview(self, job: Job) -> None:
        """Leaves out the preview that a request waits for, if it does."""
        self.previews.pop(job, None)

    def run(self, seconds_per_turn: float) -> None:
        """Encodes and decodes for about half as long as a turn takes, or one thing.

        Where no request has a step to take, all of it is done.

        Args:
            seconds_per_turn: Seconds that a turn takes.
        """
        running = self._admission.running
        started = time.perf_counter()
        while self._queue or self.previews:
            if self._queue:
                job, action = self._queue.popleft()
            else:  # only if nobody waits to begin or to end
                job = next(iter(self.previews))
                action = self.previews.pop(job)
            if job in running:
                self._guarded(job, action)
            spent = time.perf_counter() - started
            has_steps = any(job.denoising is not None for job in running)
            if has_steps and spent >= seconds_per_turn / 2:
                break
        seconds = time.perf_counter() - started
        if seconds:
            self._notifier.side_jobs_are_over(seconds)

    def _guarded(self, job: Job, action: Callable[[], None]) -> None:
        """Runs an action of one job; its error ends that job alone."""
        try:
            action()
        except Exception as err:
            self._fail(job, err)

    def _encode(self, job: Job) -> None:
        started = time.perf_counter()
        # Sets of LoRAs that no request needs now make way; the plan has room for all
        # that are needed.
        self._pipeline.adapters.make_room(
            [running.context.loras for running in self._admission.running]
        )
        inputs = self._pipeline.prepare_inputs(job.context)
        denoising = self._pipeline.encode(inputs)
        self._inputs.intern(self._pipeline, denoising)
        steps, previews = denoising.schedule.num_steps, job.options.num_previews
        job.preview_steps = tuple(
            step
            for step in range(1, steps)
            if (step - 1) * (previews + 1) // steps < step * (previews + 1) // steps
        )
        job.denoising, job.encoded = denoising, time.monotonic()
        job.seconds["encode"] = time.perf_counter() - started

    def _decode(self, job: Job, denoising: Denoising) -> None:
        started = time.perf_counter()
        denoised = self._pipeline.finish(denoising)
        frames = self._frames(job, denoised.latents)
        job.seconds["decode"] = time.perf_counter() - started
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

    def _frames(self, job: Job, latents: Buffer) -> np.ndarray:
        """Latents to uint8 ``(B, F, H, W, 3)``, in the room that there is now."""
        room = self._admission.room_to_decode()
        return decode_in_goes(self._pipeline, job.context, latents, room)
