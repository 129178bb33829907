"""What goes over the wire: OpenAI's image generation, and fields of our own."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..engine import MAX_PREVIEWS, MAX_PRIORITY
from ..types import MAX_SIZE, MAX_STEPS

OutputFormat = Literal["png", "jpeg", "webp"]
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_MAX_SEED = 2**63 - 1


class ImageGenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``.

    The first part is OpenAI's; what has no effect here is refused, not ignored. Clients
    of OpenAI's send the second part as extra fields (``extra_body`` in Python).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, description="What to draw.")]
    model: Annotated[
        str | None, Field(description="Id of the served model; may be left out.")
    ] = None
    n: Annotated[
        int | None, Field(ge=1, description="Pictures, all from one seed; 1.")
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
        int | None, Field(ge=0, le=100, description="Quality of jpeg and webp; 90.")
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
        Literal["auto"] | None,
        Field(description="Quality is set by steps and cache."),
    ] = None
    background: Literal["auto", "opaque"] | None = None
    user: Annotated[
        str | None, Field(description="Label of the caller's own; of no effect.")
    ] = None

    seed: Annotated[
        int | None,
        Field(ge=0, le=_MAX_SEED, description="Of the noise; random if left out."),
    ] = None
    steps: Annotated[
        int | None, Field(ge=1, le=MAX_STEPS, description="Denoising steps.")
    ] = None
    guidance: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            description="Guidance scale of guidance-distilled models; 3.5.",
        ),
    ] = None
    true_cfg: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            description="Classifier-free guidance, with negative_prompt; 1 is off.",
        ),
    ] = None
    negative_prompt: str | None = None
    max_sequence_length: Annotated[
        int | None,
        Field(ge=1, le=512, description="Text tokens; the most the model reads."),
    ] = None
    cache: Annotated[
        str | None, Field(description="Denoising cache: a name GET /v1/models lists.")
    ] = None
    cache_options: Annotated[
        dict[str, Any] | None, Field(description="Settings of that cache.")
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

    def pixels(self) -> tuple[int, int] | None:
        """Width and height, if they are given."""
        match = _SIZE.fullmatch(self.size or "auto")
        return None if match is None else (int(match[1]), int(match[2]))


class ImageData(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class TokenDetails(BaseModel):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens the model has read and drawn."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class Summary(BaseModel):
    """How the pictures came about, in short."""

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
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetails


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "max_diffusion"
    caches: dict[str, dict[str, Any]] = Field(
        description="Caches that requests may name, with their options and defaults."
    )
    default_cache: str
    default_cache_options: dict[str, Any] = Field(
        description="Of requests that name no cache; one that does starts from caches."
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
    cache_bytes: int = 0
