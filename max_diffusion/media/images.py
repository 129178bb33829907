"""Files of images: their names, and whether they can be written."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from ..core.files import write_file, written_file
from ..errors import RequestError


def check_writable(path: Path, where: str, *suffixes: str) -> None:
    """Refuses a path that could not be written, before anything is computed.

    Args:
        path: The file to be written.
        where: Where the path was given, for messages.
        suffixes: Suffixes that its name may end in, ``.png`` if none are given.

    Raises:
        RequestError: The path is a folder, has another suffix, or is in a folder that
            is missing or closed.
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
    """Returns ``out.png`` for one image, ``out-1.png`` ... for several."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index + 1}") for index in range(count)]


def save_atomically(path: Path, image: Image.Image) -> None:
    """Writes an image as a PNG, whole or not at all.

    Raises:
        RequestError: The file cannot be written.
    """
    write_file(path, lambda file: image.save(file, "PNG"))
