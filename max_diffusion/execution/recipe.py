"""What graphs are made of, as hashes: known without building them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Final

import graphs

from .artefacts import compiler_versions, hash_of
from .kernels import kernel_sources

# Sources that can change the graphs of a component of this package; a test watches
# which are run while graphs are built.
_SOURCES: Final = (
    "caches",
    "checkpoint/packing.py",
    "checkpoint/weights.py",
    "components",
    "core/json_values.py",
    "denoising",
    "execution/compiler.py",
    "execution/component.py",
    "execution/devices.py",
    "models",
    "sampling",
)


def subject_of(kind: type, *facts: Any) -> str:
    """Returns a hash of what graphs are made of: their class, and facts as JSON."""
    return hash_of(f"{kind.__module__}.{kind.__qualname__}", *facts)


def recipe_of(kind: type, subject: str) -> str | None:
    """Returns a hash that is equal only where the same graphs would be built.

    Args:
        kind: Class that builds them.
        subject: From :func:`subject_of`.

    Returns:
        ``None`` of a class from outside this package: nobody knows what it reads.
    """
    own = __name__.partition(".")[0]
    is_own = kind.__module__.partition(".")[0] == own
    return hash_of(subject, source_hash(), compiler_versions()) if is_own else None


def source_files() -> list[Path]:
    """Returns all sources that can change a graph of a component of this package."""
    root = Path(__file__).parents[1]
    found = [*Path(graphs.__file__).parent.glob("*.py"), *kernel_sources()]
    for name in _SOURCES:
        path = root / name
        found += path.rglob("*.py") if path.is_dir() else [path]
    return sorted(found)


@cache
def source_hash() -> str:
    """Returns a hash of :func:`source_files`."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
