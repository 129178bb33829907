"""``/v1/videos``: videos as jobs, as OpenAI's clients ask for them."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, Query, Request, Response

from .backend import Backend, ModelDescription, VideoDescription
from .bodies import shown
from .desk import (
    ERRORS,
    check_limits,
    described,
    documented_key,
    errors_of,
    submit_options,
    to_request,
)
from .errors import ApiError, checked, read_json
from .forms import is_form, read_form, values_of
from .guard import owner_of
from .jobs import Job, Variant, VideoJobs
from .ranges import ranged
from .settings import ServerSettings
from .video_schemas import Video, VideoDeleted, VideoList, VideoRequest

VIDEOS: Final = "/v1/videos"
_ONE: Final = f"{VIDEOS}/{{video_id}}"
# Numbers that were written with six digits are off by this share at most.
_SHARE: Final = 5.1e-6
# Frames, of whatever else was rounded.
_CLOSE: Final = 1e-3


def add_videos(
    app: FastAPI,
    backend: Backend,
    settings: ServerSettings,
    schema: type[VideoRequest],
) -> VideoJobs:
    """Adds the paths of videos, and returns their jobs.

    Args:
        app: The application.
        backend: Who draws.
        settings: Limits.
        schema: Of the body, with the options that only some models have.
    """
    jobs = VideoJobs(settings)
    _add_creation(app, backend, settings, jobs, schema)
    _add_jobs(app, settings, jobs)
    _add_refusals(app)
    return jobs


def _add_creation(
    app: FastAPI,
    backend: Backend,
    settings: ServerSettings,
    jobs: VideoJobs,
    schema: type[VideoRequest],
) -> None:
    @app.post(
        VIDEOS,
        dependencies=documented_key(settings),
        responses=ERRORS,
        summary="Begin a video",
        openapi_extra={"requestBody": _documented(schema)},
    )
    async def create(request: Request) -> Video:
        """Begins to draw a video, and answers at once with its job."""
        model = await described(backend)
        of_model = _check_draws_videos(model)
        video = of_model.within(settings.max_frames)
        data = await request.body()
        kind = request.headers.get("content-type", "")
        values = await asyncio.to_thread(_values, kind, data, schema)
        if values.get("input_reference") is not None:
            raise _no_reference()
        body = checked(values, schema)
        check_limits(body, settings, replace(model, video=video))
        count, fps = _frames(body, video)
        drawing = to_request(body, settings, model)
        if count != of_model.num_frames:
            options = {**drawing.options, "num_frames": count}
            drawing = replace(drawing, options=options)
        width, height = body.pixels()
        told = Video(
            id=f"video_{secrets.token_hex(24)}",
            model=settings.model,
            created_at=int(time.time()),
            prompt=body.prompt,
            size=f"{width or model.default_size[0]}x{height or model.default_size[1]}",
            seconds=f"{count / fps:.6g}",
            num_frames=count,
            fps=fps,
        )
        draw = partial(backend.draw, drawing, submit_options(body, settings))
        job = Job(told, bool(body.report), owner_of(request))
        return await jobs.start(job, draw)


def _add_jobs(app: FastAPI, settings: ServerSettings, jobs: VideoJobs) -> None:
    @app.get(
        VIDEOS,
        dependencies=documented_key(settings),
        responses=errors_of(400, 401, 404, 408, 413, 415, 422),
        summary="All videos",
    )
    async def videos(
        request: Request,
        after: Annotated[
            str | None, Query(description="Id of the last one of the page before.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[
            Literal["asc", "desc"], Query(description="desc is the newest first.")
        ] = "desc",
    ) -> VideoList:
        """Lists jobs that run, wait, or have ended and are still kept."""
        found, has_more = jobs.page(owner_of(request), after, limit, order)
        data = [job.video for job in found]
        return VideoList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )

    @app.get(
        _ONE,
        dependencies=documented_key(settings),
        responses=errors_of(400, 401, 404, 408, 413, 415, 422),
        summary="One video",
    )
    async def video(video_id: str, request: Request) -> Video:
        """Tells how a job stands."""
        return jobs.get(video_id, owner_of(request)).video

    @app.get(
        f"{_ONE}/content",
        dependencies=documented_key(settings),
        responses={
            **errors_of(400, 401, 404, 408, 413, 415, 422),
            200: {
                "description": "The video, or its first frame",
                "content": {
                    kind: {"schema": {"type": "string", "format": "binary"}}
                    for kind in ("video/mp4", "image/webp")
                },
            },
            206: {"description": "The part of it that Range asks for"},
            416: {"description": "Range begins behind its end"},
        },
        response_class=Response,
        summary="Its file",
    )
    async def content(
        video_id: str, request: Request, variant: Variant = "video"
    ) -> Response:
        """Returns the mp4, or the part of it that ``Range`` asks for.

        With ``variant`` ``thumbnail`` its first frame.
        """
        if variant == "spritesheet":
            raise ApiError(
                400,
                "variant: no spritesheets are made here; ask for video or thumbnail",
                code="unsupported",
                param="variant",
            )
        job = jobs.get(video_id, owner_of(request))
        if job.content is None:
            raise _no_content(job.video)
        if variant == "thumbnail":
            return Response(job.content.thumbnail, media_type="image/webp")
        job.is_fetched = True
        return ranged(job.content.video, "video/mp4", request.headers)

    @app.delete(
        _ONE,
        dependencies=documented_key(settings),
        responses=errors_of(400, 401, 403, 404, 408, 413, 415, 422),
        summary="Forget a video",
    )
    async def delete(video_id: str, request: Request) -> VideoDeleted:
        """Forgets a video and its file; cancels what is still drawn."""
        await jobs.delete(video_id, owner_of(request))
        return VideoDeleted(id=video_id)


def _add_refusals(app: FastAPI) -> None:
    """Adds what OpenAI has and these models cannot do."""

    async def refuse(request: Request) -> None:
        what = request.url.path.rsplit("/", 1)[-1]
        raise ApiError(
            400,
            f"{what}: these models draw videos from text alone, and read none; POST "
            f"{VIDEOS} draws a new one",
            code="unsupported",
        )

    for path in ("{video_id}/remix", "edits", "extensions", "characters"):
        app.post(f"{VIDEOS}/{path}", include_in_schema=False)(refuse)


def _check_draws_videos(model: ModelDescription) -> VideoDescription:
    if model.video is None:
        raise ApiError(
            400,
            "model: the one that is served draws pictures, not videos; POST "
            "/v1/images/generations draws one",
            code="unsupported",
            param="model",
        )
    return model.video


def _values(kind: str, data: bytes, schema: type[VideoRequest]) -> dict[str, Any]:
    """What a body holds, as JSON has it.

    Raises:
        ApiError: It cannot be read, or brings a file.
    """
    if not is_form(kind):
        return read_json(kind, data)
    form = read_form(kind, data)
    for file in form.files:
        if file.field == "input_reference":
            raise _no_reference()
        name = file.field[:80]
        raise _bad(name, "expected no file; videos are drawn from text alone here")
    return values_of(form.texts, schema)


def _frames(body: VideoRequest, video: VideoDescription) -> tuple[int, float]:
    """Number of frames that a body asks for, and how many are shown a second.

    Seconds are as many frames as are shown in them, or one more, that which ends them:
    whichever the model draws.

    Raises:
        ApiError: No video of so many seconds is drawn here, or another than
            ``num_frames`` says, or it would be a picture.
    """
    options = body.options()
    fps, count = options.get("fps", video.fps), options.get("num_frames")
    assert isinstance(fps, float | int)
    assert count is None or isinstance(count, int)
    if count is None and body.seconds is None:
        count = video.num_frames
    if count == 1:
        raise _bad(
            "num_frames",
            "a video has 2 or more, got 1; POST /v1/images/generations draws pictures",
        )
    if body.seconds is None:
        assert count is not None
        return count, float(fps)
    exact = float(body.seconds) * fps
    whole = round(exact)
    is_whole = math.isclose(exact, whole, rel_tol=_SHARE, abs_tol=_CLOSE)
    fitting = [whole, whole + 1] if is_whole else []
    if count is not None and count not in fitting:
        raise _bad(
            "seconds",
            f"num_frames {count} at {fps:g} a second is {count / fps:.6g} seconds, got "
            f"{shown(body.seconds)}; leave one out",
        )
    if count is not None:
        return count, float(fps)
    drawn = next((each for each in fitting if each in video.counts), None)
    if drawn is None:
        raise _bad(
            "seconds",
            f"{shown(body.seconds)} at {fps:g} frames a second is {exact:.6g} frames, "
            f"which are not drawn here; {_nearest(exact, fps, video)}",
        )
    return drawn, float(fps)


def _nearest(exact: float, fps: float, video: VideoDescription) -> str:
    """What may be asked for instead of a number of frames."""
    below = [each for each in video.counts if each <= exact][-1:]
    above = [each for each in video.counts if each > exact][:1]
    choices = [f'"{each / fps:.6g}" ({each} frames)' for each in below + above]
    return f"nearest: {' or '.join(choices) or 'none'}"


def _no_content(video: Video) -> ApiError:
    if video.error is not None:
        return ApiError(
            404, f"videos: it has failed: {video.error.message}", code="video_failed"
        )
    return ApiError(
        404,
        f"videos: it is {video.status}, {video.progress} % of it are done; ask again "
        "when GET /v1/videos/ID says completed",
        code="video_not_ready",
    )


def _documented(schema: type[VideoRequest]) -> dict[str, Any]:
    """The body, for the document of the interface."""
    # The schemas inside of it are there, since bodies of pictures have them, too.
    known = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    known.pop("$defs", None)
    return {
        "required": True,
        "content": {
            kind: {"schema": known}
            for kind in ("application/json", "multipart/form-data")
        },
    }


def _no_reference() -> ApiError:
    return ApiError(
        400,
        "input_reference: no model here starts from a picture or a video; leave it "
        "out, and describe it in the prompt",
        code="unsupported",
        param="input_reference",
    )


def _bad(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name}: {what}", code="invalid_value", param=name)
