"""Jobs that draw videos: they go on without their client, and are kept for a while."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

from ...core.report import RunReport
from ...engine import Event, Failed, Finished, Started, StepTaken
from ...errors import MaxDiffusionError
from ...media.metadata import text_chunks
from ...media.writers import encoded, encoded_video
from ...pipelines.outputs import GenerationResult
from .answers import summary_of
from .backend import Events
from .errors import ApiError, api_error
from .settings import ServerSettings
from .streams import Draw, begun
from .video_schemas import Video, VideoError

logger = logging.getLogger(__name__)

_THUMBNAIL_QUALITY: Final = 90
_MARGIN_SECONDS: Final = 0.01  # a loop may be early by its clock's resolution
Variant = Literal["video", "thumbnail", "spritesheet"]


@dataclass(frozen=True)
class Content:
    """Files of a finished video."""

    video: bytes
    """All of it, as mp4."""
    thumbnail: bytes
    """Its first frame, as WebP."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return len(self.video) + len(self.thumbnail)


@final
@dataclass
class Job:
    """A video on its way, or finished."""

    video: Video
    """What clients are told of it."""
    has_report: bool
    """Whether they are told what every step did."""
    owner: bytes
    """Whose it is: :func:`~.guard.owner_of` its request; others are not told of it."""
    content: Content | None = None
    """Files, once it is completed."""
    ended: float | None = None
    """When it was completed or failed, of the monotonic clock."""
    is_fetched: bool = False
    """Whether its video was asked for."""
    task: asyncio.Task[None] | None = None
    """What draws it; it is cancelled with it."""

    def tell(self, **changes: Any) -> None:
        """Changes what clients are told."""
        self.video = self.video.model_copy(update=changes)

    def fail(self, error: Exception) -> None:
        """Ends it without a video."""
        told = api_error(error)
        self.ended = time.monotonic()
        self.tell(
            status="failed",
            error=VideoError(code=told.code or "engine_error", message=told.message),
        )


@final
class VideoJobs:
    """Draws videos, and keeps what has ended for a while; in memory only.

    How many run or wait, the engine's queue limits. They are tasks of the loop that
    they were started in, and are cancelled when that ends, as nobody could fetch their
    videos any more.

    Args:
        settings: How many are kept, and how long.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._jobs: dict[str, Job] = {}  # in the order in which they were started
        # An encoder takes all cores, and frames take their room: one after the other.
        self._encoding = asyncio.Lock()

    @property
    def num_kept(self) -> int:
        """Number of jobs that are on their way, or ended and not yet forgotten."""
        return len(self._jobs)

    def num_awaited(self, since: float) -> int:
        """Number of jobs on their way, or completed since and not fetched.

        Args:
            since: Of the monotonic clock.
        """
        return sum(
            job.ended is None
            or (job.ended >= since and job.content is not None and not job.is_fetched)
            for job in self._jobs.values()
        )

    async def start(self, job: Job, draw: Draw) -> Video:
        """Has a video drawn, and returns what is known of it at once.

        Raises:
            ApiError: The request cannot be drawn now.
            MaxDiffusionError: The request was refused.
        """
        events = await begun(draw, self._settings.keep_alive_seconds)
        self._jobs[job.video.id] = job
        job.task = asyncio.create_task(self._follow(job, events))
        return job.video

    def get(self, identifier: str, owner: bytes) -> Job:
        """Returns a job by its id.

        Raises:
            ApiError: There is none of this owner.
        """
        self._forget()
        found = self._jobs.get(identifier)
        if found is None or found.owner != owner:
            raise ApiError(
                404,
                f"videos: {identifier[:80]} is not here, or no longer; draw it again",
                code="not_found",
                param="video_id",
            )
        return found

    def page(
        self, owner: bytes, after: str | None, limit: int, order: str
    ) -> tuple[list[Job], bool]:
        """Returns some of an owner's jobs, and whether there are more behind them.

        Args:
            owner: Whose jobs.
            after: Id of the one before the first; ``None`` for the first of all.
            limit: Most of them.
            order: ``asc`` for the oldest first, else the newest.

        Raises:
            ApiError: There is none to be after.
        """
        self._forget()
        if after is not None:
            self.get(after, owner)
        found = [name for name, job in self._jobs.items() if job.owner == owner]
        if order != "asc":
            found = found[::-1]
        first = 0 if after is None else found.index(after) + 1
        names = found[first : first + limit]
        return [self._jobs[name] for name in names], first + limit < len(found)

    async def delete(self, identifier: str, owner: bytes) -> None:
        """Forgets a job; cancels it, unless it has ended.

        Raises:
            ApiError: There is none of this owner.
        """
        job = self.get(identifier, owner)
        del self._jobs[identifier]
        assert job.task is not None
        job.task.cancel()
        await asyncio.wait({job.task})

    async def _follow(self, job: Job, events: Events) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    await self._take(job, event)
        except (ApiError, MaxDiffusionError) as err:  # refused after a wait
            job.fail(err)
        except Exception as err:
            logger.exception("%s has failed", job.video.id)
            job.fail(err)
        self._forget()
        # Whether or not anybody asks again: a video may be large.
        wait = self._settings.video_seconds + _MARGIN_SECONDS
        asyncio.get_running_loop().call_later(wait, self._forget)

    async def _take(self, job: Job, event: Event) -> None:
        if isinstance(event, Started):
            job.tell(status="in_progress")
        elif isinstance(event, StepTaken):
            # All of it is not before it can be fetched.
            percent = min(99, 100 * event.step // event.num_steps)
            job.tell(status="in_progress", progress=percent)
        elif isinstance(event, Failed):
            job.fail(event.error)
        elif isinstance(event, Finished):
            result = event.result
            report = replace(result.report, model=job.video.model)
            async with self._encoding:
                job.content = await asyncio.to_thread(_encoded, result, report)
            job.ended, now = time.monotonic(), int(time.time())
            job.tell(
                status="completed",
                progress=100,
                completed_at=now,
                expires_at=now + int(self._settings.video_seconds),
                size=f"{report.width}x{report.height}",
                max_diffusion=summary_of(report, job.has_report),
            )

    def _forget(self) -> None:
        """Drops what has ended too long ago, and the oldest of what is too much."""
        settings = self._settings
        ended = sorted(
            (job.ended, name) for name, job in self._jobs.items() if job.ended
        )
        oldest_allowed = time.monotonic() - settings.video_seconds
        size = sum(self._size(name) for _, name in ended)
        for index, (when, name) in enumerate(ended):
            count = len(ended) - index
            # The newest stays, whatever its size: someone waits for it.
            is_too_much = count > 1 and (
                size > settings.video_bytes or count > settings.max_videos
            )
            if when >= oldest_allowed and not is_too_much:
                break
            size -= self._size(name)
            del self._jobs[name]

    def _size(self, name: str) -> int:
        content = self._jobs[name].content
        return 0 if content is None else content.num_bytes


def _encoded(result: GenerationResult, report: RunReport) -> Content:
    [frames], text = result.frames, text_chunks(report, 0)
    return Content(
        encoded_video(frames, "mp4", result.fps, text),
        encoded(frames[0], "webp", _THUMBNAIL_QUALITY, text),
    )
