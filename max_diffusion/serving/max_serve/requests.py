"""Turns bodies of ``POST /v1/responses`` into requests of this package."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from max.pipelines.request import (
    InputImageContent,
    InputTextContent,
    OpenResponsesRequestBody,
)
from max.pipelines.request.provider_options import (
    ImageProviderOptions,
    VideoProviderOptions,
)

from ...caches import AbstractCacheConfig, cache_from_options
from ...core.grid import Frames
from ...core.loras import as_loras
from ...core.pictures import Picture, PictureInputs
from ...core.request import GenerationRequest
from ...errors import RequestError
from ...media.pictures import read_inputs
from ...pipelines.families import declared_by_all
from ..limits import limits_on_pictures
from .settings import ServeSettings

OUTPUT_FORMATS: Final = ("jpeg", "png", "webp")
_RATE: Final = "frames_per_second"
# Of its files, whatever a pipeline says.
_RATE_OF_MAX: Final = 16
_OPTION: Final = "cache_option."
_LORA: Final = "lora."
# Fields of MAX's that say what to draw, and those that are labels or MAX's own affair.
# The others, made for text, would have no effect.
_USED: Final = frozenset({"input", "metadata", "model", "provider_options", "seed"})
_LABELS: Final = frozenset({"service_tier", "store", "stream", "user"})
_BOTH_USED: Final = frozenset(
    {
        "guidance_scale",
        "height",
        "negative_prompt",
        "response_format",
        "steps",
        "true_cfg_scale",
        "width",
    }
)
_IMAGE_USED: Final = _BOTH_USED | {
    "num_images",
    "output_format",
    "secondary_negative_prompt",
    "secondary_prompt",
    "strength",
}
_VIDEO_USED: Final = _BOTH_USED | {"frames_per_second", "num_frames"}


def to_request(
    body: OpenResponsesRequestBody,
    settings: ServeSettings,
    max_pictures: int = 0,
    most_read_pixels: int | None = None,
) -> GenerationRequest:
    """Returns the request that a body asks for.

    What would have no effect is refused, not ignored. Fields that MAX's schema does not
    know are gone before this sees the body.

    Args:
        body: As MAX has read it.
        settings: Limits.
        max_pictures: Most pictures that the model takes; more are refused before any
            is decoded.
        most_read_pixels: Most pixels of each, where they are read at their own sizes.

    Raises:
        RequestError: A value is malformed, out of range or of no effect.
    """
    for name in sorted(body.model_fields_set - _USED - _LABELS):
        if getattr(body, name) is not None:
            hint = "; of images it is provider_options.image.num_images"
            raise RequestError(
                f"{name}: has no effect here{hint if name == 'n' else ''}; leave it out"
            )
    given = pixel_options(body)
    knobs = _knobs(body.metadata or {}, settings.max_prompt_length)
    own: dict[str, Any] = knobs["options"]
    if isinstance(given, ImageProviderOptions):
        knobs["prompt_2"] = given.secondary_prompt
        knobs["negative_prompt_2"] = given.secondary_negative_prompt
        knobs["num_images_per_prompt"] = given.num_images
    else:
        for option, field in (("num_frames", "num_frames"), ("fps", _RATE)):
            if option in own:
                raise RequestError(
                    f"metadata: {option}: it is {field} of provider_options.video"
                )
        own["num_frames"] = given.num_frames
        own["fps"] = given.frames_per_second
        knobs["options"] = {k: v for k, v in own.items() if v is not None}
    prompt, urls = _content(body)
    request = GenerationRequest(
        prompts=(prompt,),
        inputs=_inputs(urls, given, max_pictures),
        negative_prompt=given.negative_prompt,
        height=given.height,
        width=given.width,
        num_inference_steps=given.steps,
        # MAX's defaults are one family's; what is not given is the model's to choose.
        guidance_scale=(
            given.guidance_scale if "guidance_scale" in given.model_fields_set else None
        ),
        true_cfg_scale=(
            given.true_cfg_scale if "true_cfg_scale" in given.model_fields_set else None
        ),
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        **knobs,
    )
    _check_limits(request, settings, most_read_pixels)
    return request


def pixel_options(
    body: OpenResponsesRequestBody,
) -> ImageProviderOptions | VideoProviderOptions:
    """Returns the options of an image or of a video, all of which have an effect.

    Raises:
        RequestError: An option has no effect, or more than one kind of output is asked
            for.
    """
    options = body.provider_options
    if options.audio is not None:
        raise RequestError(
            "provider_options.audio: images and videos are drawn here; leave it out"
        )
    if options.video is not None and options.image is not None:
        raise RequestError(
            "provider_options: expected image or video, got both; leave out the one "
            "that is not drawn"
        )
    given = options.video or options.image or ImageProviderOptions.model_validate({})
    is_video = isinstance(given, VideoProviderOptions)
    kind, used = ("video", _VIDEO_USED) if is_video else ("image", _IMAGE_USED)
    for name in sorted(given.model_fields_set - used):
        if getattr(given, name) != type(given).model_fields[name].default:
            raise RequestError(
                f"provider_options.{kind}.{name}: has no effect here; leave it out"
            )
    if (
        isinstance(given, ImageProviderOptions)
        and given.output_format not in OUTPUT_FORMATS
    ):
        raise RequestError(
            "provider_options.image.output_format: expected "
            f"{', '.join(OUTPUT_FORMATS)}, got {given.output_format!r}"
        )
    return given


def check_kind(given: ImageProviderOptions | VideoProviderOptions, to: Frames) -> None:
    """Refuses a video where an image is asked for, and the other way round.

    Args:
        given: What was asked for.
        to: The frames that the model would draw.

    Raises:
        RequestError: It is, or MAX's file would show the video at another speed.
    """
    if isinstance(given, ImageProviderOptions):
        if to.count > 1:
            raise RequestError(
                f"provider_options: this model would draw a video of {to.count} "
                "frames; ask for it with provider_options.video, {} for all defaults"
            )
        return
    if to.count == 1:
        raise RequestError(
            "provider_options.video: this would be an image of one frame; ask for more "
            "in num_frames where the model draws videos, else with "
            "provider_options.image"
        )
    if given.frames_per_second is None and to.fps != _RATE_OF_MAX:
        raise RequestError(
            f"provider_options.video.{_RATE}: MAX writes {_RATE_OF_MAX} a second where "
            f"it is not given, but this model's videos have {to.fps:g}; give the number"
        )


def to_json(request: GenerationRequest) -> str:
    """Writes a request as text that MAX's server process sends to its worker.

    The pixels of its pictures go beside it.
    """
    inputs = request.inputs
    plain = {
        **vars(request),
        "cache": None,
        "inputs": None if inputs is None else {"strength": inputs.strength},
    }
    if request.cache is not None:
        plain["cache"] = [request.cache.name, asdict(request.cache)]
    return json.dumps(plain)


def from_json(text: str, images: Sequence[np.ndarray] = ()) -> GenerationRequest:
    """Reads the request that :func:`to_json` wrote.

    Args:
        text: What it wrote.
        images: Pixels of the request's pictures, uint8 ``(H, W, 3)``.
    """
    plain: dict[str, Any] = json.loads(text)
    cache, inputs = plain.pop("cache"), plain.pop("inputs")
    loras = tuple((name, weight) for name, weight in plain.pop("loras"))
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in plain.items()
    }
    if cache is not None:
        values["cache"] = cache_from_options(*cache)
    if inputs is not None:
        pictures = tuple(Picture(pixels) for pixels in images)
        values["inputs"] = PictureInputs(pictures, strength=inputs["strength"])
    return GenerationRequest(**values, loras=loras)


def brings_pictures(body: OpenResponsesRequestBody) -> bool:
    """Returns whether reading a body would decode pictures."""
    if isinstance(body.input, str):
        return False
    contents = [message.content for message in body.input]
    parts = [part for each in contents if isinstance(each, list) for part in each]
    return any(isinstance(part, InputImageContent) for part in parts)


def _content(body: OpenResponsesRequestBody) -> tuple[str, list[str]]:
    """Returns the prompt, and the data URIs of the pictures to start from."""
    if isinstance(body.input, str):
        return body.input, []
    if len(body.input) != 1 or body.input[0].role != "user":
        raise RequestError("input: expected text, or one message of the user")
    content = body.input[0].content
    if isinstance(content, str):
        return content, []
    texts = [part.text for part in content if isinstance(part, InputTextContent)]
    images = [part for part in content if isinstance(part, InputImageContent)]
    if len(texts) != 1 or len(content) != 1 + len(images):
        kinds = ", ".join(part.type for part in content) or "nothing"
        raise RequestError(
            "input: expected a message of one input_text, with an input_image to "
            f"start from one, got {kinds}"
        )
    for image in images:
        if image.detail not in (None, "auto"):
            raise RequestError(
                f"input: detail {image.detail.value} of an input_image has no effect "
                "here; leave it out"
            )
    return texts[0], [image.image_url for image in images]


def _inputs(
    urls: Sequence[str],
    given: ImageProviderOptions | VideoProviderOptions,
    max_pictures: int,
) -> PictureInputs | None:
    """Returns the pictures of some data URIs, decoded."""
    strength = None
    if isinstance(given, ImageProviderOptions) and "strength" in given.model_fields_set:
        strength = given.strength
    if not urls:
        if strength not in (
            None,
            ImageProviderOptions.model_fields["strength"].default,
        ):
            raise RequestError(
                "provider_options.image.strength: has no effect without an "
                "input_image; leave it out"
            )
        return None
    if not max_pictures:
        raise RequestError(
            "input: this server draws from text alone; leave out the input_image, or "
            "start it with MAX_DIFFUSION_PICTURES=1 and a model that takes pictures"
        )
    if len(urls) > max_pictures:
        raise RequestError(
            f"input: expected at most {max_pictures} input_image for this model, got "
            f"{len(urls)}; send fewer"
        )
    return read_inputs([_file_of(url) for url in urls], None, strength)


def _file_of(url: str) -> bytes:
    """Returns the file that a data URI holds."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError(
            "input: expected an input_image as data:image/png;base64,..., got "
            f"{url[:40]!r}"
        )
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as err:
        raise RequestError(
            f"input: the input_image is not base64 ({err}); send the whole file"
        ) from err


def _knobs(metadata: Mapping[str, str], max_length: int) -> dict[str, Any]:
    """Reads the fields of ``GenerationRequest`` that MAX has none for."""
    options: dict[str, object] = {}
    knobs: dict[str, Any] = {}
    own: dict[str, object] = {}
    loras: dict[str, Any] = {}
    declared = declared_by_all()
    for key, text in metadata.items():
        if len(key) + len(text) > max_length:
            raise RequestError(
                f"metadata: this server allows at most {max_length} characters for a "
                f"key and its value, got {len(key) + len(text)}"
            )
        if key == "cache":
            continue
        if key.startswith(_OPTION):
            options[key.removeprefix(_OPTION)] = _value(text)
        elif key.startswith(_LORA):
            loras[key.removeprefix(_LORA)] = _value(text)
        elif key == "cache_memory_limit":
            knobs[key] = _value(text)
        elif key in declared:
            value = _value(text)
            is_text = declared[key].kind is str and not isinstance(value, str)
            own[key] = text if is_text else value
        elif key == "sigmas":
            knobs[key] = _list(key, _value(text))
        else:
            hint = "; it is a field of provider_options.image"
            raise RequestError(
                f"metadata: expected cache, {_OPTION}NAME, cache_memory_limit, "
                f"{_LORA}NAME, sigmas or {', '.join(declared)}, got {key!r}"
                f"{hint if key in _IMAGE_USED else ''}"
            )
    knobs["options"] = own
    knobs["loras"] = as_loras("metadata: lora", loras)
    knobs["cache"] = _cache(metadata.get("cache"), options)
    return knobs


def _cache(
    name: str | None, options: Mapping[str, object]
) -> AbstractCacheConfig | None:
    if name is not None:
        return cache_from_options(name, options)
    if options:
        raise RequestError(
            f"metadata: {_OPTION}{next(iter(options))}: of which cache? name it in "
            "cache"
        )
    return None


def _value(text: str) -> object:
    """Reads JSON, or else text without quotes."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _list(key: str, value: object) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise RequestError(
            f"metadata: {key} must be numbers such as [1.0, 0.5], got {value!r}"
        )
    return tuple(value)


def check_drawn(height: int, width: int, frames: int, settings: ServeSettings) -> None:
    """Refuses what this server does not draw, where its size was left to the model.

    Args:
        height: Pixels.
        width: Pixels.
        frames: Of a video; 1 of an image.
        settings: Limits.

    Raises:
        RequestError: It is too large.
    """
    _check(
        ("height", height, settings.max_size, "pixels"),
        ("width", width, settings.max_size, "pixels"),
        ("num_frames", frames, settings.max_frames, "frames"),
    )


def _check_limits(
    request: GenerationRequest, settings: ServeSettings, most_read_pixels: int | None
) -> None:
    """Refuses what this server does not allow, beyond what the schema says."""
    size, steps = settings.max_size, settings.max_steps
    texts = (
        ("input", request.prompts[0]),
        ("secondary_prompt", request.prompt_2),
        ("negative_prompt", request.negative_prompt),
        ("secondary_negative_prompt", request.negative_prompt_2),
    )
    _check(
        *(
            (name, len(text or ""), settings.max_prompt_length, "characters")
            for name, text in texts
        ),
        ("num_images", request.num_images_per_prompt, settings.max_n, "pictures"),
        ("height", request.height or 1, size, "pixels"),
        ("width", request.width or 1, size, "pixels"),
        *limits_on_pictures(request.inputs, request.options, most_read_pixels, size),
        ("steps", request.num_inference_steps or 1, steps, "steps"),
        ("sigmas", len(request.sigmas or ()), steps, "steps"),
    )


def _check(*rows: tuple[str, int, int, str]) -> None:
    """Refuses the first value that is above its limit."""
    for name, value, limit, unit in rows:
        if value > limit:
            raise RequestError(
                f"{name}: this server allows at most {limit} {unit}, got {value}"
            )
