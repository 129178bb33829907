"""Turns bodies of ``POST /v1/responses`` into requests of this package."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from max.pipelines.request import OpenResponsesRequestBody
from max.pipelines.request.provider_options import ImageProviderOptions

from ...caches import AbstractCacheConfig, cache_from_options
from ...core.request import GenerationRequest
from ...errors import RequestError
from ...pipelines.families import declared_by_all
from .settings import ServeSettings

OUTPUT_FORMATS: Final = ("jpeg", "png", "webp")
_OPTION: Final = "cache_option."
# Fields of MAX's that say what to draw, and those that are labels or MAX's own affair.
# The others, made for text, would have no effect.
_USED: Final = frozenset({"input", "metadata", "model", "provider_options", "seed"})
_LABELS: Final = frozenset({"service_tier", "store", "stream", "user"})
_IMAGE_USED: Final = frozenset(
    {
        "guidance_scale",
        "height",
        "negative_prompt",
        "num_images",
        "output_format",
        "response_format",
        "secondary_negative_prompt",
        "secondary_prompt",
        "steps",
        "true_cfg_scale",
        "width",
    }
)


def to_request(
    body: OpenResponsesRequestBody, settings: ServeSettings
) -> GenerationRequest:
    """Returns the request that a body asks for.

    What would have no effect is refused, not ignored. Fields that MAX's schema does not
    know are gone before this sees the body.

    Raises:
        RequestError: A value is malformed, out of range or of no effect.
    """
    for name in sorted(body.model_fields_set - _USED - _LABELS):
        if getattr(body, name) is not None:
            hint = "; for pictures it is provider_options.image.num_images"
            raise RequestError(
                f"{name}: has no effect here{hint if name == 'n' else ''}; leave it out"
            )
    image = image_options(body)
    request = GenerationRequest(
        prompts=(_prompt(body),),
        prompt_2=image.secondary_prompt,
        negative_prompt=image.negative_prompt,
        negative_prompt_2=image.secondary_negative_prompt,
        height=image.height,
        width=image.width,
        num_inference_steps=image.steps,
        # MAX's defaults are one family's; what is not given is the model's to choose.
        guidance_scale=(
            image.guidance_scale if "guidance_scale" in image.model_fields_set else None
        ),
        true_cfg_scale=(
            image.true_cfg_scale if "true_cfg_scale" in image.model_fields_set else None
        ),
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        num_images_per_prompt=image.num_images,
        **_knobs(body.metadata or {}, settings.max_prompt_length),
    )
    _check_limits(request, settings)
    return request


def image_options(body: OpenResponsesRequestBody) -> ImageProviderOptions:
    """Returns the options of images, all of which have an effect.

    Raises:
        RequestError: An option has no effect, or another kind of output is asked for.
    """
    options = body.provider_options
    for name in ("audio", "video"):
        if getattr(options, name) is not None:
            raise RequestError(
                f"provider_options.{name}: this model draws pictures; leave it out"
            )
    image = options.image or ImageProviderOptions.model_validate({})
    for name in sorted(image.model_fields_set - _IMAGE_USED):
        if getattr(image, name) != ImageProviderOptions.model_fields[name].default:
            raise RequestError(
                f"provider_options.image.{name}: has no effect here; leave it out"
            )
    if image.output_format not in OUTPUT_FORMATS:
        raise RequestError(
            "provider_options.image.output_format: expected "
            f"{', '.join(OUTPUT_FORMATS)}, got {image.output_format!r}"
        )
    return image


def to_json(request: GenerationRequest) -> str:
    """Writes a request as text that MAX's server process sends to its worker."""
    plain = {**vars(request), "cache": None}
    if request.cache is not None:
        plain["cache"] = [request.cache.name, asdict(request.cache)]
    return json.dumps(plain)


def from_json(text: str) -> GenerationRequest:
    """Reads the request that :func:`to_json` wrote."""
    plain: dict[str, Any] = json.loads(text)
    cache = plain.pop("cache")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in plain.items()
    }
    if cache is not None:
        values["cache"] = cache_from_options(*cache)
    return GenerationRequest(**values)


def _prompt(body: OpenResponsesRequestBody) -> str:
    if isinstance(body.input, str):
        return body.input
    if len(body.input) != 1 or body.input[0].role != "user":
        raise RequestError("input: expected text, or one message of the user")
    content = body.input[0].content
    if isinstance(content, str):
        return content
    if len(content) != 1 or content[0].type != "input_text":
        kinds = ", ".join(part.type for part in content) or "nothing"
        raise RequestError(
            f"input: expected a message of one input_text, got {kinds}; this model "
            "draws from text alone"
        )
    return content[0].text


def _knobs(metadata: Mapping[str, str], max_length: int) -> dict[str, Any]:
    """Reads the fields of ``GenerationRequest`` that MAX has none for."""
    options: dict[str, object] = {}
    knobs: dict[str, Any] = {}
    own: dict[str, object] = {}
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
                f"sigmas or {', '.join(declared)}, got {key!r}"
                f"{hint if key in _IMAGE_USED else ''}"
            )
    knobs["options"] = own
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


def _check_limits(request: GenerationRequest, settings: ServeSettings) -> None:
    """Refuses what this server does not allow, beyond what the schema says."""
    steps = request.num_inference_steps or 1
    for name, value, limit, unit in (
        *(
            (name, len(text or ""), settings.max_prompt_length, "characters")
            for name, text in (
                ("input", request.prompts[0]),
                ("secondary_prompt", request.prompt_2),
                ("negative_prompt", request.negative_prompt),
                ("secondary_negative_prompt", request.negative_prompt_2),
            )
        ),
        ("num_images", request.num_images_per_prompt, settings.max_n, "pictures"),
        ("height", request.height or 1, settings.max_size, "pixels"),
        ("width", request.width or 1, settings.max_size, "pixels"),
        ("steps", steps, settings.max_steps, "steps"),
        ("sigmas", len(request.sigmas or ()), settings.max_steps, "steps"),
    ):
        if value > limit:
            raise RequestError(
                f"{name}: this server allows at most {limit} {unit}, got {value}"
            )
