"""Values of command-line options that are more than a number or a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from .errors import RequestError

# What needs MAX is imported where it is used, so that most mistakes are answered at
# once.
if TYPE_CHECKING:
    from .caches import CacheConfig

_ALL: Final = "all"


def parse_cache(
    name: str,
    options: Sequence[str],
    where: str = "--cache",
    where_options: str = "--cache-option",
) -> CacheConfig:
    """A cache's name and ``key=value`` options to its configuration.

    Args:
        name: Of ``CACHES``.
        options: ``key=value`` each.
        where: Where the name was given, for messages.
        where_options: Likewise of the options.

    Raises:
        RequestError: No such cache or option, or a value that is none.
    """
    from .caches import CACHES

    if name not in CACHES:
        raise RequestError(f"{where}: expected {', '.join(CACHES)}, got {name!r}")
    kind = CACHES[name]
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    values: dict[str, Any] = {}
    for option in options:
        key, separator, text = option.partition("=")
        if not separator:
            raise RequestError(f"{where_options}: expected key=value, got {option!r}")
        if key not in known:
            raise RequestError(
                f"{where_options}: {name} has no option {key!r}; "
                f"it has {', '.join(known) or 'none'}"
            )
        if key in values:
            raise RequestError(f"{where_options}: {key} is given twice; give it once")
        convert, expected = _CONVERTERS[hints[key]]
        try:
            values[key] = convert(text)
        except (ValueError, KeyError) as err:
            raise RequestError(
                f"{where_options}: {key} must be {expected}, got {text!r}"
            ) from err
    return kind(**values)


def parse_caches(text: str, where: str = "--caches") -> tuple[CacheConfig, ...]:
    """Caches separated by commas, each ``NAME`` or ``NAME:KEY=VALUE:KEY=VALUE``.

    ``all`` stands for every cache at its defaults. A comma that no cache's name follows
    belongs to a value: in ``step-mask:compute_steps=0,5,9,auto`` are two.

    Args:
        text: What was given.
        where: Where it was given, for messages.

    Raises:
        RequestError: As :func:`parse_cache`.
    """
    from .caches import CACHES

    items: list[str] = []
    for part in map(str.strip, text.split(",")):
        is_name = part == _ALL or part.partition(":")[0] in CACHES
        if items and ":" in items[-1] and not is_name:
            items[-1] += f",{part}"
        else:
            items.append(part)
    found: list[CacheConfig] = []
    for item in items:
        name, *options = item.split(":")
        if item == _ALL:
            found.extend(kind() for kind in CACHES.values())
        elif name not in CACHES:
            raise RequestError(
                f"{where}: expected {_ALL}, or {', '.join(CACHES)}, got {name!r}"
            )
        else:
            found.append(parse_cache(name, options, where, where))
    return tuple(found)


def chosen_cache(
    name: str | None, options: Sequence[str], file: str | None
) -> CacheConfig:
    """The cache that ``--cache`` and its options, or ``--cache-file``, name.

    Raises:
        RequestError: Both, or as :func:`parse_cache` and
            :func:`~max_diffusion.read_cache_file`.
    """
    if file is None:
        return parse_cache(name or "none", options)
    if name is not None or options:
        given = "--cache" if name is not None else "--cache-option"
        raise RequestError(
            f"--cache-file: it names the cache with its options; leave out {given}"
        )
    from .cache_file import read_cache_file

    return read_cache_file(file)


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


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """Seeds separated by commas; none of ``None``.

    Raises:
        RequestError: They are no whole numbers.
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
    """An option that was given once, for all prompts, or once for each."""
    if len(texts) < 2:
        return texts[0] if texts else None
    return tuple(texts)


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
