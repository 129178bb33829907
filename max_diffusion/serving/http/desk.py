"""From a body to an answer: what every request for something drawn goes through."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, final

from fastapi import Depends, Request, Response
from fastapi.security import HTTPBearer

from ...caches import CACHES, cache_from_options
from ...core.loras import Loras, as_loras
from ...core.pictures import PictureInputs, nearest_in_shape
from ...core.request import GenerationRequest
from ...engine import SubmitOptions
from ...errors import RequestError
from ..limits import limits_on_pictures
from .answers import Answers
from .backend import Backend, ModelDescription
from .bodies import DrawingRequest, shown
from .errors import ApiError
from .loras import LoraChoice
from .schemas import ErrorResponse, ImageGenerationRequest
from .settings import ServerSettings
from .store import ImageStore
from .streams import EventStream, begun, result_unless_gone

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorResponse, "description": "A value out of range, or no JSON"},
    401: {"model": ErrorResponse, "description": "No key, or an unknown one"},
    403: {"model": ErrorResponse, "description": "A page that may not ask"},
    404: {"model": ErrorResponse, "description": "No such model or path"},
    408: {"model": ErrorResponse, "description": "The body did not arrive"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    415: {"model": ErrorResponse, "description": "The body is compressed, or no form"},
    422: {"model": ErrorResponse, "description": "Not what the schema says"},
    429: {"model": ErrorResponse, "description": "The queue is full: Retry-After"},
    500: {"model": ErrorResponse, "description": "A step has failed"},
    503: {"model": ErrorResponse, "description": "Loading or shutting down"},
    504: {"model": ErrorResponse, "description": "Not done in its time"},
}
"""Answers that are no success, for the document of the interface."""
STREAM: Final[dict[str, Any]] = {
    "description": "The pictures; with stream, server-sent events: "
    "image_generation.started and .progress, if progress is asked for, .partial_image, "
    ".completed, one a picture, or error; of edits, image_edit.started and so on",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
"""The answer that is one, likewise."""


@final
@dataclass(frozen=True)
class Desk:
    """Has one request drawn, and answers it."""

    backend: Backend
    settings: ServerSettings
    store: ImageStore
    request: Request

    async def answer(
        self,
        body: ImageGenerationRequest,
        model: ModelDescription,
        inputs: PictureInputs | None = None,
        task: Literal["image_generation", "image_edit"] = "image_generation",
    ) -> Any:
        """Draws what a body asks for.

        Args:
            body: Checked by its schema.
            model: What is served.
            inputs: Pictures that came with it.
            task: What names of events begin with.

        Raises:
            ApiError: It is refused here.
            MaxDiffusionError: It was refused by the engine, or has failed.
        """
        settings = self.settings
        _check_draws_images(body, model)
        check_limits(body, settings, model, inputs, body.n or 1)
        _check_answer(body)
        drawing = to_request(body, settings, model, inputs, body.n or 1)
        options = replace(
            submit_options(body, settings),
            num_previews=body.partial_images or 0,
            emits_steps=bool(body.progress),
        )
        address = str(self.request.base_url) + "images/"
        answers = Answers(body, settings.model, self.store, address, task)
        draw = partial(self.backend.draw, drawing, options)
        del inputs, drawing  # the engine lets go of pictures: none may stay here
        if body.stream:
            events = await begun(draw, settings.keep_alive_seconds)
            return EventStream(events, answers, settings.keep_alive_seconds)
        waiting = result_unless_gone(self.request, draw)
        del draw
        result = await waiting
        if result is None:
            return Response(status_code=499)  # nobody is there to read it
        return await asyncio.to_thread(answers.response, result)


def errors_of(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Returns the entries of :data:`ERRORS` with these status codes."""
    return {code: ERRORS[code] for code in codes}


def documented_key(settings: ServerSettings) -> list[Any]:
    """Returns the key's entry in the API document; :class:`Guard` checks the key."""
    return [Depends(HTTPBearer(auto_error=False))] if settings.api_keys else []


async def described(backend: Backend) -> ModelDescription:
    """Returns what is served.

    Raises:
        ApiError: It is still being loaded.
    """
    model = await backend.describe()
    if model is None:
        raise ApiError(
            503,
            "server: the model is being loaded; ask again",
            code="loading",
            headers={"Retry-After": "5"},
        )
    return model


def _check_draws_images(body: DrawingRequest, model: ModelDescription) -> None:
    """Refuses a body that asks a model of videos for more than one frame.

    Raises:
        ApiError: It does.
    """
    if model.video is None:
        return
    count = body.options().get("num_frames", model.video.num_frames)
    if count != 1:
        raise ApiError(
            400,
            f"model: the one that is served would draw a video of {count} frames, and "
            "images alone are drawn here; POST /v1/videos draws videos",
            code="unsupported",
            param="model",
        )


def check_limits(
    body: DrawingRequest,
    settings: ServerSettings,
    model: ModelDescription,
    inputs: PictureInputs | None = None,
    count: int = 1,
) -> None:
    """Refuses what this server does not allow, beyond what the schema says.

    Args:
        body: Checked by its schema.
        settings: The limits.
        model: What is served.
        inputs: Pictures that came with it.
        count: Number of pictures.

    Raises:
        ApiError: A value is above its limit, or two have no effect together.
    """
    if body.model is not None and body.model != settings.model:
        raise no_such_model(body.model, settings)
    for name, text in (
        ("prompt", body.prompt),
        ("negative_prompt", body.negative_prompt or ""),
    ):
        if len(text) > settings.max_prompt_length:
            raise _too_much(name, len(text), settings.max_prompt_length, "characters")
    own = body.options()
    frames = own.get("num_frames")
    if not isinstance(frames, int):
        frames = model.video.num_frames if model.video else 1
    sides = ("width", "height") if body.width or body.height else ("size", "size")
    pixels = zip(sides, body.pixels(), _default_size(body, model, inputs), strict=True)
    for name, value, limit, unit in (
        ("n", count, settings.max_n, "pictures"),
        *(
            (name, asked or default, settings.max_size, "pixels a side")
            for name, asked, default in pixels
        ),
        *limits_on_pictures(inputs, own, model.most_read_pixels, settings.max_size),
        ("steps", body.steps or 1, settings.max_steps, "steps"),
        ("num_frames", frames, settings.max_frames, "frames"),
        ("timeout", body.timeout or 0, settings.timeout, "seconds"),
    ):
        if value > limit:
            raise _too_much(name, value, limit, unit)
    if body.cache_options and body.cache is None:
        raise ApiError(
            400,
            "cache_options: of which cache? name it in cache",
            code="invalid_value",
            param="cache_options",
        )


def _check_answer(body: ImageGenerationRequest) -> None:
    """Refuses what has no effect on how pictures are sent.

    Raises:
        ApiError: A field has none, as another is given.
    """
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
    if body.stream and body.response_format == "url":
        raise ApiError(
            400,
            "response_format: a stream carries the pictures themselves; leave it out",
            code="invalid_value",
            param="response_format",
        )


def _default_size(
    body: DrawingRequest,
    model: ModelDescription,
    inputs: PictureInputs | None,
) -> tuple[int, int]:
    """Width and height of what is drawn where a body leaves them open."""
    if inputs is None:
        return model.default_size
    width, height = body.pixels()
    is_scaled = body.options().get("auto_resize") is not False
    if model.preferred_sizes and is_scaled and width is None and height is None:
        image = inputs.images[0]
        sides = nearest_in_shape(image.height, image.width, model.preferred_sizes)
        return sides[1], sides[0]
    area = model.default_size[0] * model.default_size[1]
    sides = inputs.default_size(area, 1, height, width)
    return sides[1], sides[0]


def to_request(
    body: DrawingRequest,
    settings: ServerSettings,
    model: ModelDescription,
    inputs: PictureInputs | None = None,
    count: int = 1,
) -> GenerationRequest:
    """Returns what is drawn, as the engine takes it.

    Args:
        body: Checked by its schema.
        settings: The limits.
        model: What is served.
        inputs: Pictures that came with it.
        count: Number of pictures.

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
    return GenerationRequest(
        prompts=(body.prompt,),
        negative_prompt=body.negative_prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=body.guidance,
        true_cfg_scale=body.true_cfg,
        seed=secrets.randbelow(2**32) if body.seed in (None, -1) else body.seed,
        num_images_per_prompt=count,
        cache=cache,
        loras=_read_loras(body.loras, model.loras),
        options=body.options(),
        inputs=inputs,
        is_timed=bool(body.report),
    )


def submit_options(body: DrawingRequest, settings: ServerSettings) -> SubmitOptions:
    """Returns how a request is treated, as the engine takes it."""
    return SubmitOptions(
        priority=body.priority or 0,
        timeout=body.timeout or settings.timeout,
    )


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


def no_such_model(model: str, settings: ServerSettings) -> ApiError:
    """Returns the error of a model that is not served."""
    return ApiError(
        404,
        f"model: {shown(model)} is not served here; expected {settings.model!r}",
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
