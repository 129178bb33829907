"""Folders and text files that are written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .errors import RequestError


def prepared_folder(folder: str | Path) -> Path:
    """A folder that can be written to; made if it is missing.

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


def write_text(path: Path, text: str) -> None:
    """Writes beside the target, then renames: an interrupted run leaves no half file.

    Raises:
        RequestError: The file cannot be written.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as err:
        raise RequestError(
            f"output: {path} cannot be written ({err.strerror or err})"
        ) from err
    finally:
        partial.unlink(missing_ok=True)
