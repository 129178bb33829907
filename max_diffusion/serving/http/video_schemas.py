"""What goes over the wire of videos: OpenAI's jobs, and fields of our own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field

from .bodies import DrawingRequest
from .schemas import Summary

_OTHERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "extra_body": "its fields go beside prompt",
        "duration": "seconds says how long, or num_frames",
        "enable_teacache": 'ask for it with "cache": "teacache"',
        "frame_count": "num_frames says how many",
        "image": "videos are drawn from text alone here",
        "input_reference": "videos are drawn from text alone here",
        "n": "a job draws one video; post another",
        "num_images_per_prompt": "a job draws one video; post another",
        "output_format": "videos are mp4",
        "partial_images": "GET /v1/videos/ID tells the progress",
        "progress": "GET /v1/videos/ID tells it",
        "response_format": "GET /v1/videos/ID/content is the file",
        "stream": "GET /v1/videos/ID tells the progress",
    }
)


def _as_text(value: Any) -> Any:
    """A number as the text that OpenAI's clients send, with all of its digits."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


_Seconds: TypeAlias = Annotated[
    str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,17})?$", max_length=24)
]


class VideoRequest(DrawingRequest):
    """Body of ``POST /v1/videos``, as JSON or as a form.

    OpenAI's fields, and extra fields (``extra_body`` in OpenAI's client), which also go
    by diffusers' names. What asks for something else than is drawn here is refused, not
    ignored.
    """

    others: ClassVar[Mapping[str, str]] = _OTHERS

    seconds: Annotated[
        Annotated[
            _Seconds,
            BeforeValidator(_as_text, json_schema_input_type=_Seconds | float),
        ]
        | None,
        Field(
            description="How long it is, instead of num_frames; the model's own if "
            "both are left out."
        ),
    ] = None


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class Video(BaseModel):
    """A job that draws a video, and how it stands."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: Annotated[int, Field(ge=0, le=100, description="Percent of it.")] = 0
    created_at: int
    completed_at: int | None = None
    expires_at: Annotated[
        int | None, Field(description="Until when a finished one is kept at most.")
    ] = None
    prompt: str
    size: str
    seconds: Annotated[
        str, Field(description="How long it is: num_frames at fps, to six digits.")
    ]
    num_frames: int
    fps: float
    remixed_from_video_id: None = None
    error: VideoError | None = None
    max_diffusion: Annotated[
        Summary | None, Field(description="How it came about, once it is completed.")
    ] = None


class VideoList(BaseModel):
    """Answer of ``GET /v1/videos``."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """Answer of ``DELETE /v1/videos/{video_id}``."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
