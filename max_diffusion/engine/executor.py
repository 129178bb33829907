"""The executor: the one thread that runs the device, turn by turn."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final, final

from ..denoising.loop import Denoising
from ..errors import MaxDiffusionError, RequestCancelled
from ..execution.batcher import Batcher
from ..execution.compiler import memory_errors_said
from ..execution.graph_call import Routine
from ..pipelines.outputs import GenerationResult
from ..pipelines.text_to_image import TextToImagePipeline
from .admission import Admission
from .config import EngineConfig
from .fairness import choose
from .job import Job
from .notifier import Notifier
from .observer import EngineObserver, TurnRecord
from .requests import Failed, Finished, Started, State, StepTaken
from .side_jobs import SideJobs

logger = logging.getLogger(__name__)

# A new figure has this weight in the running mean.
_WEIGHT: Final = 0.2
_MAX_STEPS_PER_TURN: Final = 16


@final
class Executor:
    """Runs what is admitted: side jobs, then a turn, over and over.

    A turn is one round of steps of all requests whose turn it is.

    Args:
        pipeline: A loaded pipeline; only this thread runs it.
        config: Limits.
        admission: Says what runs.
        observer: Is told of every turn.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        config: EngineConfig,
        admission: Admission,
        observer: EngineObserver,
    ) -> None:
        self.batcher = Batcher(pipeline.models, config.max_batch)
        """Runs equal graph calls of several requests as one."""
        self._notifier = Notifier(observer)
        self.side_jobs = SideJobs(
            pipeline, admission, self._notifier, finish=self._finish, fail=self._fail
        )
        """What is done between turns."""
        self._admission = admission
        self._max_samples = config.max_step_samples
        self._seconds_per_turn = 0.0
        self._thread = threading.Thread(
            target=self._work, name="max-diffusion-engine", daemon=True
        )
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Waits until the thread has ended, or for so many seconds."""
        self._thread.join(timeout)

    # Below, everything runs on the executor's thread.

    def take_turn(self) -> None:
        """Has every request whose turn it is take a step."""
        started = time.perf_counter()
        chosen = choose(self._admission.running, self._max_samples)
        if not chosen:
            return
        actions: dict[str, dict[str, int]] = {}
        routines = [self._steps(job, denoising, actions) for job, denoising in chosen]
        for (job, denoising), lane in zip(
            chosen, self.batcher.run(routines), strict=True
        ):
            if lane.error is not None:
                self._fail(job, lane.error)
            elif denoising.is_done:
                job.denoising = None
                job.seconds["denoise"] = time.monotonic() - job.encoded
                self.side_jobs.add_decoding(job, denoising)
        seconds = time.perf_counter() - started
        self._seconds_per_turn += _WEIGHT * (seconds - self._seconds_per_turn)
        batches = self.batcher.record
        record = TurnRecord(
            seconds=seconds,
            graph_seconds=batches.graph_seconds,
            requests=len(chosen),
            samples=sum(denoising.batch for _, denoising in chosen),
            batches=tuple(batches.batches),
            actions=actions,
        )
        self._notifier.turn_is_over(record)

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                self.side_jobs.run(self._seconds_per_turn)
                self.take_turn()
        except BaseException as err:
            # A defect of the engine itself: nothing is known of any request any more.
            logger.exception("the engine has failed")
            failure = MaxDiffusionError(f"engine: it has failed and stopped: {err}")
            for job in self._admission.abandon():
                self._notifier.emit(job, Failed(failure), State.FAILED)

    def _wait_for_work(self) -> bool:
        """Waits until a request runs; ``False`` when none will any more."""
        while (changes := self._admission.next_changes()) is not None:
            for job, error in changes.ended:
                self._end(job, Failed(error))
            for job in changes.started:
                self._notifier.emit(job, Started())
                self.side_jobs.add_encoding(job)
            if self._admission.running:
                return True
        return False

    def _steps(
        self, job: Job, denoising: Denoising, actions: dict[str, dict[str, int]]
    ) -> Routine[None]:
        """A request's turn: a step, and those before it that need no transformer.

        They take next to no time, and so all requests meet at a step that computes.

        Args:
            job: Whose turn it is.
            denoising: Its loop.
            actions: How many samples did what, by cache, then by action; is added to.
        """
        counts = actions.setdefault(job.cache_name, {})
        for _ in range(_MAX_STEPS_PER_TURN):
            yield from denoising.advance()
            records = denoising.records[-len(denoising.branches) :]
            for record in records:
                for action in record.actions:
                    counts[action] = counts.get(action, 0) + 1
            steps = denoising.schedule.num_steps
            if job.options.emits_steps:
                event = StepTaken(denoising.step, steps, tuple(records))
                self._notifier.emit(job, event)
            if denoising.step in job.preview_steps:
                yield from self.side_jobs.add_preview(job, denoising)
            if job.is_cancelled or denoising.is_done or not denoising.is_skipped:
                return

    def _finish(self, job: Job, result: GenerationResult) -> None:
        self._admission.release(job)
        self._end(job, Finished(result))

    def _fail(self, job: Job, error: Exception) -> None:
        failure = _known(error)
        if failure is not error:
            logger.error("request %s has failed", job.handle.id, exc_info=error)
        self._admission.release(job)
        self._end(job, Failed(failure))

    def _end(self, job: Job, event: Finished | Failed) -> None:
        """Emits the last event of a request, which neither waits nor runs any more."""
        job.denoising = None
        self.side_jobs.drop(job)
        self._admission.count_cache_bytes()
        now = time.monotonic()
        state = State.FINISHED
        if isinstance(event, Failed):
            is_cancelled = isinstance(event.error, RequestCancelled)
            state = State.CANCELLED if is_cancelled else State.FAILED
        else:
            self._admission.note_finish(job, now)
        self._notifier.request_is_over(state, now - job.submitted)
        self._notifier.emit(job, event, state)


def _known(error: Exception) -> MaxDiffusionError:
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
