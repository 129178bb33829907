"""The HTTP interface: OpenAI's image generation over a backend."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib.resources import files
from typing import Any, Final

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ... import __version__
from ...caches import CACHES, cache_from_options
from ...core.loras import Loras, as_loras
from ...core.request import GenerationRequest
from ...engine import SubmitOptions
from ...errors import MaxDiffusionError, RequestError
from ...pipelines.families import declared_by_all
from .answers import Answers
from .backend import Backend, ModelDescription
from .errors import ApiError, on_api_error, on_http_error, on_not_valid
from .guard import REQUEST_ID, Guard, HeadAsGet, RequestIds
from .loras import LoraChoice
from .schemas import (
    ErrorResponse,
    Health,
    ImageGenerationRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    field_names,
    request_model,
)
from .settings import ServerSettings
from .store import ImageStore
from .streams import EventStream, begun, result_unless_gone

_SECURITY: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'unsafe-inline'; "
        "script-src 'self' 'unsafe-inline'"
    ),
    "X-Content-Type-Options": "nosniff",
}
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorResponse, "description": "A value out of range, or no JSON"},
    401: {"model": ErrorResponse, "description": "No key, or an unknown one"},
    404: {"model": ErrorResponse, "description": "No such model or path"},
    408: {"model": ErrorResponse, "description": "The body did not arrive"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    415: {"model": ErrorResponse, "description": "The body is compressed"},
    422: {"model": ErrorResponse, "description": "Not what the schema says"},
    429: {"model": ErrorResponse, "description": "The queue is full: Retry-After"},
    500: {"model": ErrorResponse, "description": "A step has failed"},
    503: {"model": ErrorResponse, "description": "Loading or shutting down"},
    504: {"model": ErrorResponse, "description": "Not done in its time"},
}

_STREAM: Final[dict[str, Any]] = {
    "description": "The pictures; with stream, server-sent events: "
    "image_generation.started and .progress, if progress is asked for, .partial_image, "
    ".completed, one a picture, or error",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
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
        description="Text-to-image diffusion, as OpenAI's image clients speak it.",
        docs_url=None,  # those load their code from elsewhere; ours is in the package
        redoc_url=None,
        lifespan=lifespan,
    )
    # The last that is added is the first that a request meets.
    app.add_middleware(
        Guard, keys=settings.api_keys, max_body_bytes=settings.max_body_bytes
    )
    app.add_middleware(HeadAsGet)
    if settings.cors_origins:
        # Before Guard: a browser asks what it may send without any key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
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
    body = request_model(declared_by_all())
    app.state.field_names = field_names(body)
    _add_images(app, backend, settings, store, body)
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
        model = await _description(backend)
        check_limits(body, settings, model)
        drawing, options = to_request(body, settings, model)
        address = str(request.base_url) + "images/"
        answers = Answers(body, settings.model, store, address)
        draw = partial(backend.draw, drawing, options)
        if body.stream:
            events = await begun(draw, settings.keep_alive_seconds)
            return EventStream(events, answers, settings.keep_alive_seconds)
        result = await result_unless_gone(request, draw)
        if result is None:
            return Response(status_code=499)  # nobody is there to read it
        return await asyncio.to_thread(answers.response, result)

    # Read by FastAPI: the schema's fields are only known when the server is made.
    generate.__annotations__["body"] = schema
    app.post(
        "/v1/images/generations",
        dependencies=_documented_key(settings),
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses={**_ERRORS, 200: _STREAM},
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
        return _card(await _description(backend), settings, started)

    @app.get(
        "/v1/models",
        summary="What is served",
        dependencies=_documented_key(settings),
        responses=_errors(400, 401, 413, 415, 503),
    )
    async def models() -> ModelList:
        """Lists the model that is served."""
        return ModelList(data=[await card()])

    @app.get(
        "/v1/models/{model:path}",
        summary="One model",
        dependencies=_documented_key(settings),
        responses=_errors(400, 401, 404, 413, 415, 422, 503),
    )
    async def model(model: str) -> ModelCard:
        """Describes the model of an id."""
        if model != settings.model:
            raise _no_such_model(model, settings)
        return await card()


def _documented_key(settings: ServerSettings) -> list[Any]:
    """Returns the key's entry in the API document; :class:`Guard` checks the key."""
    return [Depends(HTTPBearer(auto_error=False))] if settings.api_keys else []


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: _ERRORS[code] for code in codes}


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


async def _description(backend: Backend) -> ModelDescription:
    model = await backend.describe()
    if model is None:
        raise ApiError(
            503,
            "server: the model is being loaded; ask again",
            code="loading",
            headers={"Retry-After": "5"},
        )
    return model


def check_limits(
    body: ImageGenerationRequest, settings: ServerSettings, model: ModelDescription
) -> None:
    """Refuses what this server does not allow, beyond what the schema says.

    Raises:
        ApiError: A value is above its limit, or two have no effect together.
    """
    if body.model is not None and body.model != settings.model:
        raise _no_such_model(body.model, settings)
    for name, text in (
        ("prompt", body.prompt),
        ("negative_prompt", body.negative_prompt or ""),
    ):
        if len(text) > settings.max_prompt_length:
            raise _too_much(name, len(text), settings.max_prompt_length, "characters")
    sides = ("width", "height") if body.width or body.height else ("size", "size")
    pixels = zip(sides, body.pixels(), model.default_size, strict=True)
    for name, value, limit, unit in (
        ("n", body.n or 1, settings.max_n, "pictures"),
        *(
            (name, asked or default, settings.max_size, "pixels a side")
            for name, asked, default in pixels
        ),
        ("steps", body.steps or 1, settings.max_steps, "steps"),
        ("timeout", body.timeout or 0, settings.timeout, "seconds"),
    ):
        if value > limit:
            raise _too_much(name, value, limit, unit)
    if not body.stream:
        for name in ("partial_images", "progress"):
            if getattr(body, name):
                raise ApiError(
                    400,
                    f"{name}: has no effect without stream; add stream, or leave it "
                    "out",
                    code="invalid_value",
                    param=name,
                )
    # 100 is OpenAI's default, and png loses nothing.
    is_lossy = body.output_compression not in (None, 100)
    if is_lossy and (body.output_format or "png") == "png":
        raise ApiError(
            400,
            "output_compression: has no effect on png; leave it out, or ask for jpeg "
            "or webp",
            code="invalid_value",
            param="output_compression",
        )
    if body.cache_options and body.cache is None:
        raise ApiError(
            400,
            "cache_options: of which cache? name it in cache",
            code="invalid_value",
            param="cache_options",
        )
    if body.stream and body.response_format == "url":
        raise ApiError(
            400,
            "response_format: a stream carries the pictures themselves; leave it out",
            code="invalid_value",
            param="response_format",
        )


def to_request(
    body: ImageGenerationRequest, settings: ServerSettings, model: ModelDescription
) -> tuple[GenerationRequest, SubmitOptions]:
    """Returns the request and how it is treated, as the engine takes them.

    Raises:
        RequestError: A value is malformed or out of range.
        ApiError: The cache or one of its options is malformed or out of range.
    """
    width, height = body.pixels()
    cache = None
    if body.cache is not None:
        try:
            cache = cache_from_options(body.cache, body.cache_options)
        except RequestError as err:
            param = "cache_options" if body.cache in CACHES else "cache"
            raise ApiError(400, str(err), code="invalid_value", param=param) from err
    # The model's own default stays out of the request, unless the limit is below it.
    steps = body.steps
    if steps is None and model.default_steps > settings.max_steps:
        steps = settings.max_steps
    request = GenerationRequest(
        prompts=(body.prompt,),
        negative_prompt=body.negative_prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=body.guidance,
        true_cfg_scale=body.true_cfg,
        seed=secrets.randbelow(2**32) if body.seed in (None, -1) else body.seed,
        num_images_per_prompt=body.n or 1,
        cache=cache,
        loras=_read_loras(body.loras, model.loras),
        options=body.options(),
        is_timed=bool(body.report),
    )
    options = SubmitOptions(
        priority=body.priority or 0,
        timeout=body.timeout or settings.timeout,
        num_previews=body.partial_images or 0,
        emits_steps=bool(body.progress),
    )
    return request, options


def _read_loras(given: Sequence[LoraChoice] | None, served: Collection[str]) -> Loras:
    """Returns the LoRAs of a body, each with its weight.

    Args:
        given: Of the body.
        served: Names that requests may choose.

    Raises:
        ApiError: One is not served, or named twice.
    """
    choices = [(each.name, each.weight) for each in given or ()]
    unknown = next((name for name, _ in choices if name not in served), None)
    try:
        found = as_loras("loras", choices)
    except RequestError as err:
        raise _lora_error(str(err)) from err
    if unknown is not None:
        there = ", ".join(served) or "none"
        raise _lora_error(f"loras: {unknown!r} is not served here; there are: {there}")
    return found


def _lora_error(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_value", param="loras")


def _card(model: ModelDescription, settings: ServerSettings, created: int) -> ModelCard:
    width, height = model.default_size
    return ModelCard(
        id=settings.model,
        created=created,
        caches={name: dict(options) for name, options in model.caches.items()},
        cache_summaries=dict(model.cache_summaries),
        default_cache=model.default_cache,
        default_cache_options=dict(model.default_cache_options),
        options=list(model.options),
        loras=dict(model.loras),
        default_size=f"{width}x{height}",
        default_steps=min(model.default_steps, settings.max_steps),
        max_size=settings.max_size,
        max_n=settings.max_n,
        max_steps=settings.max_steps,
    )


def _no_such_model(model: str, settings: ServerSettings) -> ApiError:
    return ApiError(
        404,
        f"model: {model!r} is not served here; expected {settings.model!r}",
        code="model_not_found",
        param="model",
    )


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _too_much(name: str, value: float, limit: float, unit: str) -> ApiError:
    return ApiError(
        400,
        f"{name}: this server allows at most {_plain(limit)} {unit}, got "
        f"{_plain(value)}",
        code="invalid_value",
        param=name,
    )
