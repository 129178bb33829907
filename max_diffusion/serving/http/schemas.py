"""What goes over the wire: OpenAI's image generation, and fields of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, Field

from ...core.request import MAX_SIZE
from ...engine import MAX_PREVIEWS
from .bodies import DrawingRequest, also

OutputFormat = Literal["png", "jpeg", "webp"]

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
"""Fields of other servers that would have no effect on pictures, and what to do
instead."""


class ImageGenerationRequest(DrawingRequest):
    """Body of ``POST /v1/images/generations``.

    OpenAI's fields, and extra fields (``extra_body`` in OpenAI's client), which also go
    by diffusers' names. What asks for something else than is drawn here is refused, not
    ignored.
    """

    others: ClassVar[Mapping[str, str]] = OTHERS

    n: Annotated[
        int | None,
        Field(
            ge=1,
            validation_alias=also("n"),
            description="Pictures, all from one seed; 1. Or num_images_per_prompt.",
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
    progress: Annotated[
        bool | None,
        Field(description="In a stream, an event a step: what the cache did."),
    ] = None

    def warnings(self) -> Iterator[str]:
        """Yields a warning for each field that is taken and has no effect."""
        if self.style is not None:
            yield "style: has no effect; describe it in the prompt"
        if self.moderation is not None:
            yield "moderation: has no effect; nothing is moderated here"


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


class VideoCard(BaseModel):
    """What requests may ask of a model that draws videos."""

    num_frames: Annotated[int, Field(description="Of requests that do not say.")]
    fps: Annotated[float, Field(description="Of requests that do not say.")]
    frame_counts: Annotated[
        list[int], Field(description="What num_frames may be, in ascending order.")
    ]


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
    needed_inputs: list[str] = Field(description="What of it each request must bring.")
    max_pictures: int = Field(
        description="Most images of a request of POST /v1/images/edits."
    )
    default_strength: float | None = Field(
        description="Of edits that do not say; null where strength is no input."
    )
    video: VideoCard | None = Field(
        description="Where it draws videos, at POST /v1/videos; null of pictures."
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
