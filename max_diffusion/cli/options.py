"""Values of command-line options that are more than a number or a word."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import RequestError

# What needs MAX is imported where it is used, so that most mistakes are answered at
# once.
if TYPE_CHECKING:
    from ..caches import AbstractCacheConfig


def chosen_cache(
    name: str | None, options: Sequence[str], file: str | None
) -> AbstractCacheConfig:
    """Returns the cache that ``--cache`` and its options, or ``--cache-file``, name.

    Raises:
        RequestError: Both are given, or as
            :func:`~max_diffusion.caches.cache_from_text` and
            :func:`~max_diffusion.read_cache_file` raise it.
    """
    if file is None:
        from ..caches import cache_from_text

        return cache_from_text(name or "none", options)
    if name is not None or options:
        given = "--cache" if name is not None else "--cache-option"
        raise RequestError(
            f"--cache-file: it names the cache with its options; leave out {given}"
        )
    from ..caches.cache_file import read_cache_file

    return read_cache_file(file)


def typed(text: str) -> str:
    """Decodes text of the command line as UTF-8, also where the locale is not."""
    if not any("\udc80" <= mark <= "\udcff" for mark in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        return text  # which the request will refuse


def memory_size(option: str, text: str | None) -> int | None:
    """Returns the bytes of a size such as ``64MiB``; ``None`` of ``None``.

    Raises:
        RequestError: The text is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?(B|KiB|MiB|GiB)?", text)
    if match is None:
        raise RequestError(
            f"{option}: expected a size such as 500KiB, 64MiB or 2GiB, got {text!r}"
        )
    units = ("B", "KiB", "MiB", "GiB")
    return int(float(match[1]) * 1024 ** units.index(match[2] or "B"))


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """Returns the seeds of a text, separated by commas; none of ``None``.

    Raises:
        RequestError: A seed is no whole number.
    """
    if text is None:
        return ()
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError as err:
        raise RequestError(
            "--seed: expected a whole number, or one of each picture such as 1,2,3, "
            f"got {text!r}"
        ) from err


def one_or_several(texts: Sequence[str]) -> str | tuple[str, ...] | None:
    """Returns what was given once, for all prompts, or once for each of them."""
    if len(texts) < 2:
        return texts[0] if texts else None
    return tuple(texts)
