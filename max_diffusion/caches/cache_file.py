"""Files that say which cache to use: what ``max-diffusion tune`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.files import write_text
from ..core.report import plain
from ..errors import RequestError
from . import AbstractCacheConfig, cache_from_options


def read_cache_file(path: str | Path) -> AbstractCacheConfig:
    """Reads the cache that a file names.

    Args:
        path: JSON file: ``{"cache": "taylorseer", "options": {"cache_interval": 4}}``;
            options that are left out have their defaults, and ``tuning`` is for
            people.

    Raises:
        RequestError: It cannot be read, or holds something else.
    """
    where = f"cache file {path}"
    try:
        # Editors of Windows put a byte order mark first.
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as err:
        raise RequestError(
            f"{where} cannot be read ({err.strerror}); max-diffusion tune writes one"
        ) from err
    except (ValueError, RecursionError) as err:
        raise RequestError(f"{where} is no JSON: {err}") from err
    if not isinstance(data, dict) or not isinstance(data.get("cache"), str):
        raise RequestError(f'{where}: expected {{"cache": NAME, "options": ...}}')
    unknown = sorted(set(data) - {"cache", "options", "tuning"})
    if unknown:
        raise RequestError(
            f"{where}: expected cache, options and tuning, got {', '.join(unknown)}"
        )
    options = data.get("options", {})
    if not isinstance(options, dict):
        raise RequestError(f"{where}: options must be an object, got {options!r}")
    try:
        return cache_from_options(data["cache"], options)
    except RequestError as err:
        raise RequestError(f"{where}: {err}") from err


def write_cache_file(
    path: str | Path,
    cache: AbstractCacheConfig,
    tuning: Mapping[str, Any] | None = None,
) -> None:
    """Writes what :func:`read_cache_file` reads, whole or not at all.

    Args:
        path: File to write; replaced if it exists.
        cache: The cache that the file is to name, with all of its options.
        tuning: How the cache was found, in JSON's types; ``None`` to leave it out.

    Raises:
        RequestError: The file cannot be written.
    """
    data: dict[str, Any] = {"cache": cache.name, "options": plain(asdict(cache))}
    if tuning is not None:
        data["tuning"] = tuning
    write_text(Path(path), json.dumps(data, indent=1) + "\n")
