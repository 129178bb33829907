"""The HTTP interface: OpenAI's images and videos over a backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.resources import files
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ... import __version__
from ...errors import MaxDiffusionError
from ...pipelines.families import declared_by_all
from .backend import Backend, ModelDescription, VideoDescription
from .bodies import request_model
from .desk import (
    ERRORS,
    STREAM,
    Desk,
    described,
    documented_key,
    errors_of,
    no_such_model,
)
from .edits import UPLOAD_PATHS, ImageEditRequest, add_edits
from .errors import ApiError, on_api_error, on_http_error, on_not_valid
from .guard import REQUEST_ID, Guard, HeadAsGet, RequestIds
from .schemas import (
    Health,
    ImageGenerationRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    VideoCard,
)
from .settings import ServerSettings
from .store import ImageStore
from .video_schemas import VideoRequest
from .videos import VIDEOS, add_videos

_SECURITY: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
        "style-src 'unsafe-inline'; script-src 'self' 'unsafe-inline'"
    ),
    "X-Content-Type-Options": "nosniff",
}

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    backend: Backend, settings: ServerSettings, lifespan: Lifespan | None = None
) -> FastAPI:
    """Creates the application; several may live in one process.

    Args:
        backend: Who draws the images.
        settings: Limits of requests, and keys.
        lifespan: Context around the first and the last request, as FastAPI takes it;
            ``None`` for none.
    """
    app = FastAPI(
        title="max_diffusion",
        version=__version__,
        description="Images and videos by diffusion, as OpenAI's clients speak it.",
        docs_url=None,  # those load their code from elsewhere; ours is in the package
        redoc_url=None,
        lifespan=lifespan,
    )
    # The last that is added is the first that a request meets.
    app.add_middleware(
        Guard,
        keys=settings.api_keys,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        upload_paths=UPLOAD_PATHS,
        form_paths=(VIDEOS,),
        origins=settings.cors_origins,
    )
    app.add_middleware(HeadAsGet)
    if settings.cors_origins:
        # Before Guard: a browser asks what it may send without any key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("Retry-After", REQUEST_ID),
            # A page that is allowed may be public, and this server at home.
            allow_private_network=True,
        )
    app.add_middleware(RequestIds)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(MaxDiffusionError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_not_valid)
    app.add_exception_handler(HTTPException, on_http_error)
    store = ImageStore(settings.image_bytes, settings.image_seconds)
    # Of every family: which one is served, is not known before it is loaded.
    options = declared_by_all()
    body = request_model(ImageGenerationRequest, options)
    edit = request_model(ImageEditRequest, options)
    app.state.body = body
    _add_images(app, backend, settings, store, body)
    add_edits(app, backend, settings, store, edit)
    video = request_model(VideoRequest, options)
    app.state.video_jobs = add_videos(app, backend, settings, video)
    _add_models(app, backend, settings)
    _add_state(app, backend, settings)
    _add_pages(app)
    return app


def _add_images(
    app: FastAPI,
    backend: Backend,
    settings: ServerSettings,
    store: ImageStore,
    schema: type[ImageGenerationRequest],
) -> None:
    async def generate(body: ImageGenerationRequest, request: Request) -> Any:
        desk = Desk(backend, settings, store, request)
        return await desk.answer(body, await described(backend))

    # Read by FastAPI: the schema's fields are only known when the server is made.
    generate.__annotations__["body"] = schema
    app.post(
        "/v1/images/generations",
        dependencies=documented_key(settings),
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses={**ERRORS, 200: STREAM},
        summary="Draw pictures",
    )(generate)

    @app.get("/images/{name}", include_in_schema=False)
    async def image(name: str) -> Response:
        found = store.get(name)
        if found is None:
            raise ApiError(
                404, f"images: {name} is not here, or no longer; draw it again"
            )
        kind, data = found
        return Response(data, media_type=kind, headers=_SECURITY)


def _add_models(app: FastAPI, backend: Backend, settings: ServerSettings) -> None:
    started = int(time.time())

    async def card() -> ModelCard:
        return _card(await described(backend), settings, started)

    @app.get(
        "/v1/models",
        summary="What is served",
        dependencies=documented_key(settings),
        responses=errors_of(400, 401, 413, 415, 503),
    )
    async def models() -> ModelList:
        """Lists the model that is served."""
        return ModelList(data=[await card()])

    @app.get(
        "/v1/models/{model:path}",
        summary="One model",
        dependencies=documented_key(settings),
        responses=errors_of(400, 401, 404, 413, 415, 422, 503),
    )
    async def model(model: str) -> ModelCard:
        """Describes the model of an id."""
        if model != settings.model:
            raise no_such_model(model, settings)
        return await card()


def _add_state(app: FastAPI, backend: Backend, settings: ServerSettings) -> None:
    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"model": Health, "description": "Not ready"}
    }

    @app.get("/health/live", summary="Whether the process answers")
    async def live() -> dict[str, str]:
        """Answers as long as the process runs."""
        return {"status": "live"}

    @app.get("/health", summary="Ready?", response_model=Health, responses=not_ready)
    @app.get(
        "/health/ready", summary="Ready?", response_model=Health, responses=not_ready
    )
    async def ready() -> JSONResponse:
        """Tells whether requests are drawn; answers 503 if not."""
        health = await backend.health(settings.model)
        return JSONResponse(
            health.model_dump(), 200 if health.status == "ready" else 503
        )

    @app.get(
        "/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse
    )
    async def metrics() -> Response:
        """Returns figures in Prometheus's text format."""
        text = await backend.metrics()
        return Response(text, media_type="text/plain; version=0.0.4")


def _add_pages(app: FastAPI) -> None:
    folder = files(__package__) / "static"

    def add(path: str, name: str) -> None:
        text = (folder / name).read_text(encoding="utf-8")

        @app.get(path, include_in_schema=False, name=name)
        async def page() -> HTMLResponse:
            return HTMLResponse(text, headers=_SECURITY)

    add("/", "index.html")
    add("/docs", "docs.html")


def _card(model: ModelDescription, settings: ServerSettings, created: int) -> ModelCard:
    width, height = model.default_size
    video = model.video
    return ModelCard(
        id=settings.model,
        created=created,
        caches={name: dict(options) for name, options in model.caches.items()},
        cache_summaries=dict(model.cache_summaries),
        default_cache=model.default_cache,
        default_cache_options=dict(model.default_cache_options),
        options=list(model.options),
        loras=dict(model.loras),
        inputs=list(model.inputs),
        needed_inputs=list(model.needed_inputs),
        max_pictures=model.max_pictures,
        default_strength=model.default_strength,
        video=None if video is None else _video_card(video, settings.max_frames),
        default_size=f"{width}x{height}",
        default_steps=min(model.default_steps, settings.max_steps),
        max_size=settings.max_size,
        max_n=settings.max_n,
        max_steps=settings.max_steps,
    )


def _video_card(video: VideoDescription, max_frames: int) -> VideoCard:
    video = video.within(max_frames)
    return VideoCard(
        num_frames=video.num_frames,
        fps=video.fps,
        frame_counts=list(video.counts),
    )
