"""Pictures to files that say how they were made."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from PIL import Image

from ..core.files import write_file, written_file
from ..errors import RequestError
from .metadata import exif_and_xmp, png_info

PICTURE_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
)
"""Formats by the suffix of a file's name."""
_MAX_SIDES: Final = MappingProxyType({"png": 2**31 - 1, "jpeg": 65_535, "webp": 16_383})
"""Pixels of a side that a format has room for."""
_FILE_QUALITY: Final = 95


def check_writable(path: Path, where: str, *suffixes: str) -> None:
    """Refuses a path that could not be written, before anything is computed.

    Args:
        path: The file.
        where: Where it was given, for messages.
        suffixes: Those its name may end in, ``.png`` if none are given.

    Raises:
        RequestError: A folder, of another suffix, or in a folder that is missing or
            closed.
    """
    suffixes = suffixes or (".png",)
    try:
        folder = written_file(path).parent
        if path.is_dir():
            raise RequestError(f"{where}: {path} is a folder; give a file name in it")
        if path.suffix.lower() not in suffixes:
            known = ", ".join(suffixes[:-1]) + " or " * (len(suffixes) > 1)
            only = "the formats" if len(suffixes) > 1 else "the only format"
            raise RequestError(
                f"{where}: {path} must end in {known}{suffixes[-1]}, {only} written, "
                f"got {path.suffix or 'no suffix'}"
            )
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise RequestError(f"{where}: {folder} {what}; make it or choose another")
        is_closed = path.exists() and not os.access(path, os.W_OK)
    except OSError as err:  # a name too long, a folder that may not be looked into
        raise RequestError(
            f"{where}: {path} cannot be written ({err.strerror}); choose another path"
        ) from err
    if is_closed or not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(
            f"{where}: {path} cannot be written (no permission); choose another path"
        )


def output_paths(path: Path, count: int) -> list[Path]:
    """``out.png`` for one picture, ``out-1.png`` ... for several."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index + 1}") for index in range(count)]


def check_sides(path: Path, height: int | None, width: int | None, where: str) -> None:
    """Refuses a picture that is too large for the format of its file.

    Raises:
        RequestError: A side has more pixels than the format can say.
    """
    kind = PICTURE_KINDS[path.suffix.lower()]
    for name, size in (("height", height), ("width", width)):
        if size is not None and size > _MAX_SIDES[kind]:
            raise RequestError(
                f"{where}: {path}: expected a {name} of at most {_MAX_SIDES[kind]} "
                f"pixels, all that {kind} has room for, got {size}; write a .png"
            )


def encoded(
    picture: np.ndarray, kind: str, quality: int, text: Mapping[str, str]
) -> bytes:
    """One picture as the bytes of a file.

    Args:
        picture: uint8 ``(H, W, 3)``.
        kind: ``png``, ``jpeg`` or ``webp``.
        quality: 0 to 100, of the latter two.
        text: Of :func:`~max_diffusion.media.metadata.text_chunks`.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    if kind == "png":
        # Half the default's time; a fifth larger.
        image.save(buffer, "PNG", pnginfo=png_info(text), compress_level=3)
    else:
        said = exif_and_xmp(kind, text)
        image.save(buffer, kind.upper(), quality=quality, **said)
    return buffer.getvalue()


def save_picture(path: Path, picture: np.ndarray, text: Mapping[str, str]) -> None:
    """Writes one picture in the format of the file's suffix; whole or not at all.

    JPEG and WebP in quality 95.

    Args:
        path: File to write; replaced if it is there.
        picture: uint8 ``(H, W, 3)``.
        text: Of :func:`~max_diffusion.media.metadata.text_chunks`; any Unicode.

    Raises:
        RequestError: The file cannot be written.
    """
    data = encoded(picture, PICTURE_KINDS[path.suffix.lower()], _FILE_QUALITY, text)
    write_file(path, lambda file: file.write(data))


def save_atomically(path: Path, image: Image.Image) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        RequestError: The file cannot be written.
    """
    write_file(path, lambda file: image.save(file, "PNG"))
