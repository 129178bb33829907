"""What goes over the wire: OpenAI's image generation, and fields of our own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from ...core.noise import MAX_SEED
from ...core.options import DeclaredOption
from ...core.request import MAX_SIZE, MAX_STEPS
from ...core.setting_names import SHORT_FORMS
from ...engine import MAX_PREVIEWS, MAX_PRIORITY
from ...errors import RequestError
from .loras import GivenLoras

OutputFormat = Literal["png", "jpeg", "webp"]
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {**SHORT_FORMS, "num_images_per_prompt": "n"}
)
"""Our fields by the names that they have in diffusers, and in servers after it."""
OTHERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "extra_body": "its fields go beside prompt",
        "complexity": "steps and cache set the quality",
        "enable_teacache": 'ask for it with "cache": "teacache"',
        "frame_count": "pictures do not move here",
        "frame_duration_ms": "pictures do not move here",
        "image": "POST /v1/images/edits takes it, as a file of a form",
        "input_fidelity": "at /v1/images/edits strength sets what stays",
        "markup": "a mask says where to draw",
        "mask": "POST /v1/images/edits takes it, as a file of a form",
        "svg": "pictures are png, jpeg or webp",
    }
)
"""Fields of other servers that would have no effect, and what to do instead."""
FIXES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "background": "no picture is transparent",
        "quality": "steps and cache set it",
    }
)
"""Words that an error adds where a field has a value that is not allowed, by field."""


class TwoNamesError(ValueError):
    """Says that one setting is given by two names, and that they differ."""

    def __init__(self, param: str, one: object, second: str, other: object) -> None:
        super().__init__(
            f"{param}: is the same as {second}, but they are given as {shown(one)} and "
            f"{shown(other)}; leave one out"
        )
        self.param = param


def _also(name: str) -> AliasChoices:
    """Returns the names of a field, its own first."""
    return AliasChoices(name, *(a for a, field in ALIASES.items() if field == name))


class ImageGenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``.

    The first part is OpenAI's, the second are extra fields (``extra_body`` in OpenAI's
    client), which also go by diffusers' names. What asks for something else than is
    drawn here is refused, not ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, description="What to draw.")]
    model: Annotated[
        str | None, Field(description="Id of the served model; may be left out.")
    ] = None
    n: Annotated[
        int | None,
        Field(
            ge=1,
            validation_alias=_also("n"),
            description="Pictures, all from one seed; 1. Or num_images_per_prompt.",
        ),
    ] = None
    size: Annotated[
        str | None,
        Field(
            pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
            description="WIDTHxHEIGHT in pixels; auto is the model's own.",
        ),
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="The picture itself, or where to fetch it for a while."),
    ] = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[
        int | None,
        Field(ge=0, le=100, description="Quality of jpeg and webp; 90. 100 for png."),
    ] = None
    stream: Annotated[
        bool | None, Field(description="Server-sent events instead of one answer.")
    ] = None
    partial_images: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_PREVIEWS,
            description="Pictures on the way, in a stream. OpenAI allows up to 3.",
        ),
    ] = None
    quality: Annotated[
        Literal["auto", "standard"] | None,
        Field(description="Quality is set by steps and cache."),
    ] = None
    background: Literal["auto", "opaque"] | None = None
    style: Annotated[
        Literal["vivid", "natural"] | None,
        Field(description="Of no effect, which the warnings say: the prompt sets it."),
    ] = None
    moderation: Annotated[
        Literal["auto", "low"] | None,
        Field(description="Of no effect, which the warnings say."),
    ] = None
    user: Annotated[
        str | None, Field(description="Label of the caller's own; of no effect.")
    ] = None
    safety_identifier: Annotated[
        str | None, Field(description="OpenAI's newer name of user.")
    ] = None

    seed: Annotated[
        int | None,
        Field(
            ge=-1,
            le=MAX_SEED,
            description="Of the noise; random if left out or -1, and then told.",
        ),
    ] = None
    width: Annotated[
        int | None,
        Field(ge=1, le=MAX_SIZE, description="Pixels, instead of size."),
    ] = None
    height: Annotated[
        int | None,
        Field(ge=1, le=MAX_SIZE, description="Pixels, instead of size."),
    ] = None
    steps: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_STEPS,
            validation_alias=_also("steps"),
            description="Denoising steps. Or num_inference_steps.",
        ),
    ] = None
    guidance: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            validation_alias=_also("guidance"),
            description="Guidance scale of guidance-distilled models; 3.5. Or "
            "guidance_scale.",
        ),
    ] = None
    true_cfg: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            validation_alias=_also("true_cfg"),
            description="Classifier-free guidance, with negative_prompt; 1 is off. Or "
            "true_cfg_scale.",
        ),
    ] = None
    negative_prompt: str | None = None
    cache: Annotated[
        str | None, Field(description="Denoising cache: a name GET /v1/models lists.")
    ] = None
    cache_options: Annotated[
        dict[str, Any] | None, Field(description="Settings of that cache.")
    ] = None
    loras: Annotated[
        GivenLoras | None,
        Field(
            description="LoRAs that GET /v1/models lists: names, or objects with a "
            "name and a weight."
        ),
    ] = None
    priority: Annotated[
        int | None, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="0.")
    ] = None
    timeout: Annotated[
        float | None,
        Field(
            ge=1,
            allow_inf_nan=False,
            description="Seconds after which there is an error instead of a picture.",
        ),
    ] = None
    progress: Annotated[
        bool | None,
        Field(description="In a stream, an event a step: what the cache did."),
    ] = None
    report: Annotated[
        bool | None,
        Field(description="What every step did, with the picture."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _merge_names(cls, data: Any) -> Any:
        """Leaves one name of each field; drops other servers' fields that are null."""
        if not isinstance(data, dict):
            return data
        given = {k: v for k, v in data.items() if v is not None or k not in OTHERS}
        for alias, name in ALIASES.items():
            if alias not in given or name not in given:
                continue
            if given[name] is None:
                del given[name]
            elif given[alias] is None or _is_same(given[alias], given[name]):
                del given[alias]
            else:
                raise TwoNamesError(alias, given[alias], name, given[name])
        return given

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if _SIZE.fullmatch(self.size or ""):
            for name, pixels in zip(("width", "height"), self.pixels(), strict=True):
                other = getattr(self, name)
                if other is not None and other != pixels:
                    raise TwoNamesError(name, other, "size", self.size)
        return self

    def pixels(self) -> tuple[int | None, int | None]:
        """Returns width and height in pixels, ``None`` where not given."""
        match = _SIZE.fullmatch(self.size or "")
        if match is None:
            return self.width, self.height
        return int(match[1]), int(match[2])

    def options(self) -> dict[str, object]:
        """Returns what is given of the options that only some models have."""
        common = ImageGenerationRequest.model_fields
        return {k: v for k, v in self if k not in common and v is not None}

    def warnings(self) -> Iterator[str]:
        """Yields a warning for each field that is taken and has no effect."""
        if self.style is not None:
            yield "style: has no effect; describe it in the prompt"
        if self.moderation is not None:
            yield "moderation: has no effect; nothing is moderated here"


def _is_same(one: object, other: object) -> bool:
    """Whether two values of JSON are equal; ``true`` is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def shown(value: object) -> str:
    """Formats a value of a body for a message.

    It is written as JSON has it, save for the quotes of text, and cut to 80 characters.
    """
    is_text = isinstance(value, str)
    text = repr(value) if is_text else json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"


def field_names(body: type[ImageGenerationRequest]) -> tuple[str, ...]:
    """Returns all names that a request may use."""
    return (*body.model_fields, *ALIASES)


_Body = TypeVar("_Body", bound=ImageGenerationRequest)


def request_model(
    base: type[_Body], options: Mapping[str, DeclaredOption]
) -> type[_Body]:
    """Creates a body's schema with the options that only some models have.

    Args:
        base: The schema without them.
        options: The options, by name.

    Raises:
        RequestError: One of them has the name of a field.
    """
    found: dict[str, Any] = {}
    for name, declared in options.items():
        if name in base.model_fields or name in ALIASES:
            raise RequestError(
                f"{name}: an option of a model family has the name of a field of every "
                "request; rename it"
            )
        description = f"{declared.help[:1].upper()}{declared.help[1:]}."
        is_number = declared.kind in (int, float)
        limits: dict[str, Any] = {
            "ge": declared.minimum,
            "le": declared.maximum,
            "allow_inf_nan": False if declared.kind is float else None,
        }
        given = {k: v for k, v in limits.items() if is_number and v is not None}
        found[name] = (
            Annotated[declared.kind | None, Field(description=description, **given)],
            None,
        )
    return create_model(
        base.__name__,
        __base__=base,
        __doc__=base.__doc__,
        **found,
    )


class ImageData(BaseModel):
    """One image: its bytes in base64, or its URL."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class TokenDetails(BaseModel):
    """Numbers of tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Numbers of tokens that the model has read and drawn."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class Summary(BaseModel):
    """How the images came about, in short."""

    seed: int
    steps: int
    cache: str
    full_passes: int
    total_passes: int
    cache_bytes: int
    seconds: float
    warnings: list[str]
    report: dict[str, Any] | None = None


class ImagesResponse(BaseModel):
    """Answer of ``POST /v1/images/generations``."""

    created: int
    background: Literal["opaque"] = "opaque"
    data: list[ImageData]
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage
    max_diffusion: Summary


class ErrorDetails(BaseModel):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetails


class ModelCard(BaseModel):
    """What requests may ask of one served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "max_diffusion"
    caches: dict[str, dict[str, Any]] = Field(
        description="Caches that requests may name, with their options and defaults."
    )
    cache_summaries: dict[str, str] = Field(
        description="What each of these caches does, in a sentence."
    )
    default_cache: str
    default_cache_options: dict[str, Any] = Field(
        description="Of requests that name no cache; one that does starts from caches."
    )
    options: list[str] = Field(description="Fields that other models do not have.")
    loras: dict[str, int] = Field(
        description="LoRAs that requests may choose, with the bytes that each changes."
    )
    inputs: list[str] = Field(
        description="What POST /v1/images/edits takes here; nothing without pictures."
    )
    default_size: str
    default_steps: int
    max_size: Annotated[int, Field(le=MAX_SIZE)]
    max_n: int
    max_steps: int


class ModelList(BaseModel):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """How the server stands."""

    status: Literal["loading", "ready", "draining", "failed"]
    detail: str = ""
    model: str
    queued: int = 0
    running: int = 0
    reserved_bytes: int = 0
    memory_limit: int = 0
    lora_bytes: int = 0
    cache_bytes: int = 0
