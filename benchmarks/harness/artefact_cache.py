"""A cache of folders that take minutes to make, kept from benchmark to benchmark."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

_STAMP: Final = "made-of"


def made_once(folder: Path, of: str, make: Callable[[Path], None] | None) -> Path:
    """Makes a folder once, and again if it would be made of something else.

    Args:
        folder: Where the folder is kept.
        of: Digest of all that the folder is made of.
        make: Fills the folder, which is empty; ``None`` where it may not be made. A
            ``make`` that raises leaves a folder that will be made again.

    Returns:
        ``folder``.

    Raises:
        FileNotFoundError: The folder is not there, and may not be made.
    """
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text() == of:
        return folder
    if make is None:
        raise FileNotFoundError(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    stamp.write_text(of)
    return folder


def digest(parts: Iterable[str | Path]) -> str:
    """SHA-256 of texts, and of the names and contents of folders' files.

    Args:
        parts: Texts and folders; another order has another digest.

    Returns:
        64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode() + b"\0")
            continue
        for path in sorted(p for p in part.rglob("*") if p.is_file()):
            found.update(f"{path.relative_to(part)}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()
