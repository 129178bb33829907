"""The HTTP interface: OpenAI's image generation over a backend."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Final

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    StreamingResponse,
)
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from .. import __version__
from ..engine import (
    Event,
    Failed,
    Finished,
    Preview,
    Started,
    StepTaken,
    SubmitOptions,
)
from ..errors import MaxDiffusionError
from ..images import encoded
from ..metadata import text_chunks
from ..report import RunReport
from ..text_to_image import GenerationResult, named_cache
from ..types import GenerationRequest
from .backend import Backend, ModelDescription
from .errors import ApiError, api_error, on_api_error, on_http_error, on_not_valid
from .guard import Guard
from .schemas import (
    ErrorResponse,
    Health,
    ImageData,
    ImageGenerationRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    Summary,
    TokenDetails,
    Usage,
)
from .settings import ServerSettings
from .store import ImageStore

_QUALITY: Final = 90
_SECURITY: Final = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'unsafe-inline'; "
        "script-src 'self' 'unsafe-inline'"
    ),
    "X-Content-Type-Options": "nosniff",
}
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorResponse, "description": "A value out of range"},
    401: {"model": ErrorResponse, "description": "No key, or an unknown one"},
    404: {"model": ErrorResponse, "description": "No such model or path"},
    408: {"model": ErrorResponse, "description": "The body did not arrive"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
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
    """The application; several may live in one process.

    Args:
        backend: Who draws.
        settings: Limits and keys.
        lifespan: What is done before the first request and after the last.
    """
    app = FastAPI(
        title="max_diffusion",
        version=__version__,
        description="Text-to-image diffusion, as OpenAI's image clients speak it.",
        docs_url=None,  # those load their code from elsewhere; ours is in the package
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(
        Guard, keys=settings.api_keys, max_body_bytes=settings.max_body_bytes
    )
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(MaxDiffusionError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_not_valid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_api_error)
    store = ImageStore(settings.image_bytes, settings.image_seconds)
    _add_images(app, backend, settings, store)
    _add_models(app, backend, settings)
    _add_state(app, backend, settings)
    _add_pages(app)
    return app


def _add_images(
    app: FastAPI, backend: Backend, settings: ServerSettings, store: ImageStore
) -> None:
    @app.post(
        "/v1/images/generations",
        dependencies=_documented_key(settings),
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses={**_ERRORS, 200: _STREAM},
        summary="Draw pictures",
    )
    async def generate(body: ImageGenerationRequest, request: Request) -> Any:
        model = await _description(backend)
        check_limits(body, settings, model)
        drawing, options = to_request(body, settings, model)
        address = str(request.base_url) + "images/"
        answers = Answers(body, settings.model, store, address)
        events = await backend.draw(drawing, options)
        if body.stream:
            return StreamingResponse(
                _stream(events, answers),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        result = await _result_unless_gone(request, events)
        if result is None:
            return Response(status_code=499)  # nobody is there to read it
        return await asyncio.to_thread(answers.response, result)

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
        responses=_errors(401, 413, 503),
    )
    async def models() -> ModelList:
        """What is served."""
        return ModelList(data=[await card()])

    @app.get(
        "/v1/models/{model:path}",
        summary="One model",
        dependencies=_documented_key(settings),
        responses=_errors(401, 404, 413, 422, 503),
    )
    async def model(model: str) -> ModelCard:
        """One model."""
        if model != settings.model:
            raise _no_such_model(model, settings)
        return await card()


def _documented_key(settings: ServerSettings) -> list[Any]:
    """For the document only; :class:`Guard` has checked the key before."""
    return [Depends(HTTPBearer(auto_error=False))] if settings.api_keys else []


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: _ERRORS[code] for code in codes}


def _add_state(app: FastAPI, backend: Backend, settings: ServerSettings) -> None:
    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"model": Health, "description": "Not ready"}
    }

    @app.get("/health/live", summary="Whether the process answers")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/health", summary="Ready?", response_model=Health, responses=not_ready)
    @app.get(
        "/health/ready", summary="Ready?", response_model=Health, responses=not_ready
    )
    async def ready() -> JSONResponse:
        """Whether requests are drawn; 503 if not."""
        health = await backend.health(settings.model)
        return JSONResponse(
            health.model_dump(), 200 if health.status == "ready" else 503
        )

    @app.get(
        "/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
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
    """What this server allows, beyond what the schema does.

    Raises:
        ApiError: Something is more, or has no effect together.
    """
    if body.model is not None and body.model != settings.model:
        raise _no_such_model(body.model, settings)
    for name, text in (
        ("prompt", body.prompt),
        ("negative_prompt", body.negative_prompt or ""),
    ):
        if len(text) > settings.max_prompt_length:
            raise _too_much(name, len(text), settings.max_prompt_length, "characters")
    width, height = body.pixels() or model.default_size
    for name, value, limit, unit in (
        ("n", body.n or 1, settings.max_n, "pictures"),
        ("size", max(width, height), settings.max_size, "pixels a side"),
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
    if body.output_compression is not None and (body.output_format or "png") == "png":
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
    """The body as the engine takes it.

    Raises:
        RequestError: A value is malformed or out of range.
    """
    width, height = body.pixels() or (None, None)
    cache = None
    if body.cache is not None:
        cache = named_cache(body.cache, body.cache_options)
    request = GenerationRequest(
        prompts=(body.prompt,),
        negative_prompt=body.negative_prompt,
        height=height,
        width=width,
        num_inference_steps=body.steps or min(model.default_steps, settings.max_steps),
        guidance_scale=body.guidance,
        true_cfg_scale=1.0 if body.true_cfg is None else body.true_cfg,
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        num_images_per_prompt=body.n or 1,
        cache=cache,
    )
    options = SubmitOptions(
        priority=body.priority or 0,
        timeout=body.timeout or settings.timeout,
        num_previews=body.partial_images or 0,
        tells_steps=bool(body.progress),
    )
    return request, options


@dataclass(frozen=True)
class Answers:
    """Makes what is sent from what the engine tells."""

    body: ImageGenerationRequest
    model: str
    store: ImageStore
    address: str
    """Where kept pictures are fetched."""

    @property
    def kind(self) -> str:
        """Format of the pictures."""
        return self.body.output_format or "png"

    def response(self, result: GenerationResult) -> ImagesResponse:
        """The answer to a request without a stream."""
        report = replace(result.report, model=self.model)
        data = []
        for index, picture in enumerate(result.images):
            file = self._file(picture, text_chunks(report, index))
            if self.body.response_format == "url":
                name = self.store.put(file, self.kind)
                data.append(ImageData(url=self.address + name))
            else:
                data.append(ImageData(b64_json=base64.b64encode(file).decode()))
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=self.body.output_format or "png",
            size=f"{report.width}x{report.height}",
            usage=_usage(report),
            max_diffusion=self._summary(report),
        )

    def events(self, event: Event) -> list[dict[str, Any]]:
        """What a stream sends for an event of the engine."""
        if isinstance(event, Started) and self.body.progress:
            return [{"type": "image_generation.started"}]
        if isinstance(event, StepTaken) and self.body.progress:
            return [_progress(event)]
        if isinstance(event, Preview):
            return [
                self._image_event("partial_image", picture, {}, index)
                | {"partial_image_index": event.index, "step": event.step}
                for index, picture in enumerate(event.images)
            ]
        if isinstance(event, Finished):
            report = replace(event.result.report, model=self.model)
            usage = _usage(report).model_dump()
            summary = self._summary(report).model_dump(exclude_none=True)
            return [
                self._image_event(
                    "completed", picture, text_chunks(report, index), index
                )
                | {"usage": usage, "max_diffusion": summary}
                for index, picture in enumerate(event.result.images)
            ]
        if isinstance(event, Failed):
            return [{"type": "error", **api_error(event.error).body}]
        return []

    def _image_event(
        self, kind: str, picture: np.ndarray, text: Mapping[str, str], index: int
    ) -> dict[str, Any]:
        height, width = picture.shape[:2]
        return {
            "type": f"image_generation.{kind}",
            "b64_json": base64.b64encode(self._file(picture, text)).decode(),
            "background": "opaque",
            "created_at": int(time.time()),
            "output_format": self.kind,
            "quality": "auto",
            "size": f"{width}x{height}",
            "image_index": index,
        }

    def _file(self, picture: np.ndarray, text: Mapping[str, str]) -> bytes:
        quality = self.body.output_compression
        return encoded(
            picture, self.kind, _QUALITY if quality is None else quality, text
        )

    def _summary(self, report: RunReport) -> Summary:
        return Summary(
            seed=report.seed,
            steps=report.num_inference_steps,
            cache=str(report.cache["name"]),
            full_passes=report.full_passes,
            total_passes=report.total_passes,
            cache_bytes=report.cache_bytes,
            seconds=report.total_seconds,
            warnings=list(report.warnings),
            report=report.to_dict() if self.body.report else None,
        )


def _progress(event: StepTaken) -> dict[str, Any]:
    return {
        "type": "image_generation.progress",
        "step": event.step,
        "num_steps": event.num_steps,
        "branches": [
            {
                "branch": record.branch,
                "actions": list(record.actions),
                "signal": _finite(record.signal),
                "milliseconds": record.milliseconds,
                "sigma": record.sigma,
            }
            for record in event.records
        ],
    }


def _finite(values: tuple[float, ...] | None) -> list[float | None] | None:
    if values is None:
        return None
    return [value if np.isfinite(value) else None for value in values]


def _usage(report: RunReport) -> Usage:
    text = report.text_tokens * len(report.prompts)
    drawn = report.image_tokens * report.num_images
    return Usage(
        input_tokens=text,
        output_tokens=drawn,
        total_tokens=text + drawn,
        input_tokens_details=TokenDetails(text_tokens=text, image_tokens=0),
    )


async def _stream(
    events: AsyncGenerator[Event, None], answers: Answers
) -> AsyncIterator[str]:
    """Server-sent events; closed by the server when the client has left."""
    async with aclosing(events):
        async for event in events:
            # Encoding a picture takes milliseconds, which other streams need not wait.
            for data in await asyncio.to_thread(answers.events, event):
                yield f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"


async def _result_unless_gone(
    request: Request, events: AsyncGenerator[Event, None]
) -> GenerationResult | None:
    """Waits for the pictures; ``None``, and cancelled, if the client leaves.

    Raises:
        MaxDiffusionError: Why there are none.
    """

    async def last() -> Event:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Finished | Failed):
                    return event
        raise AssertionError("the last event is Finished or Failed")

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(last()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return None
        event = tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Finished)
    return event.result


def _card(model: ModelDescription, settings: ServerSettings, created: int) -> ModelCard:
    width, height = model.default_size
    return ModelCard(
        id=settings.model,
        created=created,
        caches={name: dict(options) for name, options in model.caches.items()},
        default_cache=model.default_cache,
        default_cache_options=dict(model.default_cache_options),
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
