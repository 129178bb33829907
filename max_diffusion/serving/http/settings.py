"""What a server allows: its limits and keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ...core.files import read_lines
from ...core.request import MAX_SIZE, MAX_STEPS
from ...core.validation import count, whole
from ...errors import RequestError

_ORIGIN: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_DEFAULT_PORTS: Final = MappingProxyType({"http": "80", "https": "443"})


@dataclass(frozen=True)
class ServerSettings:
    """Limits of requests, and keys.

    Attributes:
        model: Id of the model that ``GET /v1/models`` gives.
        api_keys: Bearer keys; with none, everyone may ask.
        cors_origins: Origins, as browsers send them, whose pages may ask from a
            browser, or ``*``. With none, only the server's own pages may.
        max_body_bytes: Most bytes of a request's body.
        max_upload_bytes: Most bytes of a request's body that brings pictures.
        max_prompt_length: Most characters of a prompt, and of a negative prompt.
        max_n: Most images of a request.
        max_size: Most pixels of an image's side.
        max_steps: Most denoising steps of a request.
        max_frames: Most frames of a video.
        timeout: Seconds that a request gets if it does not ask for less.
        image_bytes: Most bytes of images kept for ``response_format: url``; the oldest
            go first.
        image_seconds: Seconds that these images are kept.
        video_bytes: Most bytes of finished videos kept; the oldest go first.
        video_seconds: Seconds that a job is kept after its end, with its video.
        max_videos: Most jobs kept after their end.
        keep_alive_seconds: Seconds of silence after which a stream sends a comment.
    """

    model: str = "demo"
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 256 * 1024
    max_upload_bytes: int = 32 * 1024**2
    max_prompt_length: int = 32_000
    max_n: int = 10
    max_size: int = 2048
    max_steps: int = 200
    max_frames: int = 161  # ten seconds at 16 a second, and the one that ends them
    timeout: float = 600.0
    image_bytes: int = 256 * 1024**2
    image_seconds: float = 3600.0
    video_bytes: int = 1024**3
    video_seconds: float = 3600.0
    max_videos: int = 1000
    keep_alive_seconds: float = 10.0

    def __post_init__(self) -> None:
        """Checks the ranges of the limits, and the form of keys and origins."""
        for name in (
            "max_body_bytes",
            "max_upload_bytes",
            "max_prompt_length",
            "max_n",
            "max_frames",
            "image_bytes",
            "video_bytes",
            "max_videos",
        ):
            count(f"server: {name}", getattr(self, name), minimum=1)
        whole("server: max_size", self.max_size, minimum=1, maximum=MAX_SIZE)
        whole("server: max_steps", self.max_steps, minimum=1, maximum=MAX_STEPS)
        for name in ("timeout", "image_seconds", "video_seconds", "keep_alive_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RequestError(
                    f"server: {name} must be a number of seconds above 0, got "
                    f"{getattr(self, name)!r}"
                )
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise RequestError(
                    "server: an API key must be printable ASCII without spaces; choose "
                    "another"
                )
        for origin in self.cors_origins:
            _check_origin(origin)


def _check_origin(origin: str) -> None:
    """Refuses an origin that no browser sends, and that so would never match."""
    if origin in ("*", "null"):
        return
    match = _ORIGIN.fullmatch(origin)
    if match is None or match["port"] == _DEFAULT_PORTS.get(match["scheme"], ""):
        raise RequestError(
            "server: a CORS origin must be * or SCHEME://HOST, with :PORT where it is "
            f"not the scheme's own, in lower case and without a path, got {origin!r}"
        )


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Reads keys from a file, one per line.

    Empty lines and those that begin with ``#`` are skipped.

    Raises:
        RequestError: The file cannot be read, or holds no key.
    """
    try:
        lines = read_lines(path)
    except OSError as err:
        raise RequestError(
            f"--api-key-file: {path} cannot be read ({err.strerror}); give a text file "
            "with a key a line"
        ) from err
    except UnicodeDecodeError as err:
        raise RequestError(
            f"--api-key-file: {path} is no UTF-8 text; save it as UTF-8, a key a line"
        ) from err
    stripped = (line.strip() for line in lines)
    keys = tuple(line for line in stripped if line and not line.startswith("#"))
    if not keys:
        raise RequestError(
            f"--api-key-file: {path} holds no key; write one a line, or leave the "
            "option out to let everyone ask"
        )
    return keys
