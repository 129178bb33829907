"""Files of a model folder, read with errors that say what to do."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from ..errors import ModelLoadError

# What Git leaves in a large file's place until `git lfs pull`.
_POINTER = b"version https://git-lfs"


def short_name(path: Path) -> str:
    """A file's name with its folder's, for messages; cut to 200 characters."""
    folder = path.parent.name
    name = f"{folder}/{path.name}" if folder else path.name
    return name if len(name) <= 200 else name[:199] + "…"


def shown(name: str) -> str:
    """A name that a file gives, for messages: in one line, cut to 120 characters."""
    line = name if name.isprintable() else repr(name)[1:-1]
    return line if len(line) <= 120 else line[:119] + "…"


def check_file(path: Path) -> None:
    """Opens a file, and looks at its first bytes.

    Raises:
        ModelLoadError: It cannot be read, or Git LFS has put a pointer in its place.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
    except OSError as err:
        raise ModelLoadError(
            f"{short_name(path)}: cannot be read ({err.strerror}); check the path and "
            "its permissions"
        ) from err
    if head == _POINTER:
        raise ModelLoadError(
            f"{short_name(path)}: expected the file, got Git LFS's pointer to it; run "
            "`git lfs pull` in the model's folder, or download the model again"
        )


@final
@dataclass(frozen=True)
class FileStamp:
    """What tells that a file is as it was when its header was read."""

    path: Path
    size: int
    """Bytes."""
    mtime_ns: int
    inode: int
    is_mapped: bool = False
    """Whether it stays mapped: another in its place does not matter then."""

    @classmethod
    def of(cls, path: Path, file: BinaryIO) -> FileStamp:
        """The stamp of a file that is open."""
        found = os.fstat(file.fileno())
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ino)

    def check(self) -> None:
        """Refuses a file that is another: it was not checked.

        Reading a mapped one that was cut would end the process.

        Raises:
            ModelLoadError: The file was changed, or is gone and not mapped.
        """
        try:
            found = os.stat(self.path)
        except OSError as err:
            if self.is_mapped:
                return
            raise ModelLoadError(
                f"{short_name(self.path)}: cannot be read again ({err.strerror}); put "
                "the file back, or load the model again"
            ) from err
        # Only there: some network file systems number a file anew.
        if self.is_mapped and found.st_ino != self.inode:
            return
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ModelLoadError(
                f"{short_name(self.path)}: changed since it was read ({self.size} "
                f"bytes then, {found.st_size} now); load the model again"
            )


def mapped_bytes(path: Path) -> np.ndarray:
    """A file's bytes, mapped: uint8, read-only; those that are used are read."""
    with path.open("rb") as file:
        # The array keeps the mapping alive; the file may close.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, np.uint8)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelLoadError: It cannot be read, or is no JSON object.
    """
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as err:
        raise ModelLoadError(
            f"{short_name(path)}: not readable as JSON ({err}); download it again"
        ) from err
    if not isinstance(value, dict):
        raise ModelLoadError(
            f"{short_name(path)}: expected a JSON object, got {type(value).__name__}"
        )
    return value


def names_in(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted; links to nothing are none.

    Raises:
        ModelLoadError: The folder cannot be looked into.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as err:
        raise ModelLoadError(
            f"{short_name(folder)}: cannot be read ({err.strerror}); check the path "
            "and its permissions"
        ) from err
