"""Folders for output, files written whole or not at all, and lines of text."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import RequestError


def prepared_folder(folder: str | Path) -> Path:
    """Returns a folder that can be written to; creates it if it is missing.

    Raises:
        RequestError: There is a file in its place, or no permission.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise RequestError(
            f"output: {path} cannot be made ({err.strerror}); choose another folder"
        ) from err
    if not os.access(path, os.W_OK | os.X_OK):
        raise RequestError(
            f"output: {path} cannot be written to (no permission); choose another "
            "folder"
        )
    return path


def check_folder(folder: str | Path) -> Path:
    """Refuses a folder that could not be made, before anything is computed.

    Raises:
        RequestError: There is a file in its place, or no permission.
    """
    path = Path(folder)
    if not str(folder):
        raise RequestError("output: expected a folder, got ''; . is this one")
    try:
        whole = path.absolute()
        nearest = next(part for part in (whole, *whole.parents) if part.exists())
    except OSError as err:  # a name too long, a folder that may not be looked into
        raise RequestError(
            f"output: {path} cannot be made ({err.strerror}); choose another folder"
        ) from err
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "no permission" if nearest.is_dir() else f"{nearest} is no folder"
        raise RequestError(
            f"output: {path} cannot be made ({what}); choose another folder"
        )
    return path


def written_file(path: Path) -> Path:
    """Returns the file that writing to ``path`` changes: the target of a link.

    Raises:
        OSError: The links go in a circle, or there is a device or a pipe.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, "no regular file")
    return target


def write_text(path: Path, text: str, where: str = "output") -> None:
    """Writes UTF-8 text, whole or not at all; see :func:`write_file`."""
    write_file(path, lambda file: file.write(text.encode("utf-8")), where)


def write_file(
    path: Path, write: Callable[[BinaryIO], object], where: str = "output"
) -> None:
    """Writes beside the target, then renames: an interrupted run leaves no half file.

    Args:
        path: File to write; replaced if it exists. Of a symbolic link, its target.
        write: Called with the open file.
        where: Name of what is written, for messages.

    Raises:
        RequestError: The file cannot be written.
    """
    partial = None
    try:
        target = written_file(path)
        partial = target.with_name(f".{secrets.token_hex(8)}.part")
        with partial.open("xb") as file:
            write(file)
        partial.replace(target)
    except OSError as err:
        raise RequestError(
            f"{where}: {path} cannot be written ({err.strerror or err})"
        ) from err
    finally:
        with suppress(OSError):
            if partial is not None:
                partial.unlink(missing_ok=True)


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a UTF-8 text of any system, without their ends.

    Only a line feed, with or without a carriage return before it, ends a line: what
    else ``str.splitlines`` takes for an end may stand within one. A byte order mark is
    no part of the first.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is no UTF-8.
    """
    text = path.read_bytes().decode("utf-8-sig")
    return [line.removesuffix("\r") for line in text.split("\n")]
