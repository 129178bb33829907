"""Encodes frames as the bytes of a file, in the format that its suffix names."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Final, final

import numpy as np
from PIL import Image

from ..core.files import write_file
from ..errors import RequestError
from .metadata import SETTINGS_KEY, exif_and_xmp, png_info

_FILE_QUALITY: Final = 95
DEFAULT_FPS: Final = 8.0
"""Frames a second of videos that say nothing of it."""
_MIN_FPS: Final = 0.1
# x264's constant quality; 17 is taken for visually lossless.
_MP4_QUALITY: Final = "17"


@final
@dataclass(frozen=True)
class Format:
    """A file format, and what it can hold."""

    kind: str
    """Name of the format, as Pillow and av have it in lower case."""
    max_side: int
    """Most pixels that a side can have."""
    holds_image: bool
    """Whether a file can hold a single frame."""
    holds_video: bool
    """Whether a file can hold several frames."""
    max_fps: float = 1000.0
    """Most frames a second that players show as they are."""


_PNG: Final = Format("png", 2**31 - 1, holds_image=True, holds_video=False)
_JPEG: Final = Format("jpeg", 65_535, holds_image=True, holds_video=False)

FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        ".png": _PNG,
        ".jpg": _JPEG,
        ".jpeg": _JPEG,
        ".webp": Format("webp", 16_383, holds_image=True, holds_video=True),
        ".gif": Format("gif", 65_535, holds_image=True, holds_video=True, max_fps=50),
        ".mp4": Format("mp4", 16_384, holds_image=False, holds_video=True),
    }
)
"""The formats that can be written, by the suffix of a file's name."""


def format_of(path: Path) -> Format:
    """Returns the format of a file whose suffix is one of :data:`FORMATS`."""
    return FORMATS[path.suffix.lower()]


def check_sides(path: Path, height: int | None, width: int | None, where: str) -> None:
    """Refuses frames that are too large for the format of their file.

    Args:
        path: The file; its suffix is known.
        height: Height of the frames in pixels, if it is known.
        width: Width of the frames in pixels, if it is known.
        where: Where the file was given, for messages.

    Raises:
        RequestError: A side has more pixels than the format can say.
    """
    found = format_of(path)
    for name, size in (("height", height), ("width", width)):
        if size is not None and size > found.max_side:
            raise RequestError(
                f"{where}: {path}: expected a {name} of at most {found.max_side} "
                f"pixels, all that {found.kind} has room for, got {size}; write a .png"
            )


def check_frames(
    path: Path, num_frames: int, where: str, fps: float | None = None
) -> None:
    """Refuses a file whose format cannot hold so many frames, or show them so fast.

    Args:
        path: The file; its suffix is known.
        num_frames: Number of frames to write into the file.
        where: Where the file was given, for messages.
        fps: Frames a second, of a video.

    Raises:
        RequestError: There is one frame, and the format is for videos; or the reverse;
            or there are too many or too few frames a second.
    """
    found = format_of(path)
    is_video = num_frames > 1
    if found.holds_video if is_video else found.holds_image:
        if is_video and fps is not None and not _MIN_FPS <= fps <= found.max_fps:
            raise RequestError(
                f"{where}: {path}: {found.kind} shows {_MIN_FPS:g} to "
                f"{found.max_fps:g} frames a second, got {fps:g}; set fps, or write "
                "another format"
            )
        return
    fitting = [
        suffix
        for suffix, other in FORMATS.items()
        if (other.holds_video if is_video else other.holds_image)
    ]
    what = f"a video of {num_frames} frames" if is_video else "an image"
    raise RequestError(
        f"{where}: {path}: {found.kind} cannot hold {what}; write "
        f"{', '.join(fitting[:-1])} or {fitting[-1]}"
    )


def encoded(
    image: np.ndarray, kind: str, quality: int, text: Mapping[str, str]
) -> bytes:
    """Encodes one image as the bytes of a file.

    Args:
        image: The image, uint8 ``(H, W, 3)``.
        kind: The format: ``png``, ``jpeg`` or ``webp``.
        quality: Quality of the latter two formats, 0 to 100.
        text: What :func:`~max_diffusion.media.metadata.text_chunks` returns.
    """
    buffer, shown = io.BytesIO(), Image.fromarray(image)
    if kind == "png":
        # Half the default's time; a fifth larger.
        shown.save(buffer, "PNG", pnginfo=png_info(text), compress_level=3)
    else:
        shown.save(buffer, kind.upper(), quality=quality, **exif_and_xmp(kind, text))
    return buffer.getvalue()


def encoded_video(
    frames: np.ndarray, kind: str, fps: float | None, text: Mapping[str, str]
) -> bytes:
    """Encodes frames as the bytes of a file that shows one after the other.

    Pillow joins equal frames, which then last as long as all of them; a WebP of equal
    frames alone is a still image. A GIF's frames last a multiple of 10 ms each, all
    together as long as they should. H.264 halves the resolution of colours where both
    sides are even, and keeps it where one is odd, which fewer players show.

    Args:
        frames: The frames, uint8 ``(F, H, W, 3)``.
        kind: The format: ``gif`` or ``webp``, which repeat, or ``mp4``.
        fps: Frames per second; ``None`` for 8.
        text: What :func:`~max_diffusion.media.metadata.text_chunks` returns.
    """
    rate = DEFAULT_FPS if fps is None else fps
    if kind == "mp4":
        return _mp4(frames, rate, text)
    first, *rest = map(Image.fromarray, frames)
    said: dict[str, object] = {}
    if kind == "webp":
        said = {"quality": _FILE_QUALITY, **exif_and_xmp(kind, text)}
    elif SETTINGS_KEY in text:
        said = {"comment": text[SETTINGS_KEY].encode()}
    buffer = io.BytesIO()
    first.save(
        buffer,
        kind.upper(),
        save_all=True,
        append_images=rest,
        duration=_durations(len(frames), rate, 10 if kind == "gif" else 1),
        loop=0,
        **said,
    )
    return buffer.getvalue()


def save_frames(
    path: Path, frames: np.ndarray, text: Mapping[str, str], fps: float | None = None
) -> None:
    """Writes one sample in the format of the file's suffix; whole or not at all.

    JPEG and WebP are written in quality 95.

    Args:
        path: File to write, which passed :func:`check_frames`; replaced if it exists.
        frames: The frames, uint8 ``(F, H, W, 3)``.
        text: What :func:`~max_diffusion.media.metadata.text_chunks` returns, in any
            Unicode.
        fps: Frames per second of a video; ``None`` for 8.

    Raises:
        RequestError: The file cannot be written.
    """
    kind = format_of(path).kind
    if len(frames) == 1 and kind != "gif":
        data = encoded(frames[0], kind, _FILE_QUALITY, text)
    else:
        data = encoded_video(frames, kind, fps, text)
    write_file(path, lambda file: file.write(data))


def _durations(count: int, fps: float, unit: int) -> list[int]:
    """Returns each frame's milliseconds, in whole units, that do not drift."""
    ends = [round(index * 1000 / fps / unit) * unit for index in range(count + 1)]
    return [end - start for start, end in pairwise(ends)]


def _mp4(frames: np.ndarray, fps: float, text: Mapping[str, str]) -> bytes:
    import av  # takes a while, and few need it
    from av.video.reformatter import (
        ColorPrimaries,
        ColorRange,
        Colorspace,
        ColorTrc,
        VideoReformatter,
    )

    _, height, width, _ = frames.shape
    buffer = io.BytesIO()

    def again(url: str, flags: int, options: Mapping[str, str]) -> io.BytesIO:
        """What is written so far, to be read."""
        return io.BytesIO(buffer.getvalue())

    # The index is moved to its beginning, for players that stream, for which the file
    # is opened again.
    told = {"movflags": "+faststart"}
    with av.open(buffer, "w", format="mp4", options=told, io_open=again) as container:
        if SETTINGS_KEY in text:
            container.metadata["comment"] = text[SETTINGS_KEY]
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height = width, height
        is_even = height % 2 == width % 2 == 0
        stream.pix_fmt = "yuv420p" if is_even else "yuv444p"
        stream.options = {"crf": _MP4_QUALITY}
        # Said, since players guess by the size of what says nothing.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG
        reformatter = VideoReformatter()
        for frame in frames:
            image = reformatter.reformat(
                av.VideoFrame.from_ndarray(frame, format="rgb24"),
                format=stream.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return buffer.getvalue()
