"""Values of command-line options that are more than a number or a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_type_hints

from .errors import RequestError

# What needs MAX is imported where it is used, so that most mistakes are answered at
# once.
if TYPE_CHECKING:
    from .caches import CacheConfig


def parse_cache(name: str, options: Sequence[str]) -> CacheConfig:
    """A cache's name and ``key=value`` options to its configuration.

    Raises:
        RequestError: No such cache or option, or a value that is none.
    """
    from .caches import CACHES

    if name not in CACHES:
        raise RequestError(f"--cache: expected {', '.join(CACHES)}, got {name!r}")
    kind = CACHES[name]
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    values: dict[str, Any] = {}
    for option in options:
        key, separator, text = option.partition("=")
        if not separator:
            raise RequestError(f"--cache-option: expected key=value, got {option!r}")
        if key not in known:
            raise RequestError(
                f"--cache-option: {name} has no option {key!r}; "
                f"it has {', '.join(known) or 'none'}"
            )
        if key in values:
            raise RequestError(f"--cache-option: {key} is given twice; give it once")
        convert, expected = _CONVERTERS[hints[key]]
        try:
            values[key] = convert(text)
        except (ValueError, KeyError) as err:
            raise RequestError(
                f"--cache-option: {key} must be {expected}, got {text!r}"
            ) from err
    return kind(**values)


def memory_size(option: str, text: str | None) -> int | None:
    """Bytes from text such as ``64MiB``; ``None`` stays so.

    Raises:
        RequestError: It is no size.
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


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(",")) if text else ()


def _steps(text: str) -> tuple[int, ...] | str:
    """Step indices separated by commas, or a policy's name."""
    if text[:1].isdigit():
        return tuple(int(step) for step in text.split(","))
    return text


# How a field of a cache's configuration is read from text, by the field's type.
_CONVERTERS: Mapping[object, tuple[Callable[[str], Any], str]] = MappingProxyType(
    {
        int: (int, "a whole number"),
        float: (float, "a number"),
        str: (str, "text"),
        tuple[int, ...] | str: (_steps, "step indices like 0,5,9 or a policy"),
        tuple[float, ...]: (_numbers, "numbers separated by commas"),
        bool: ({"true": True, "false": False}.__getitem__, "true or false"),
    }
)
