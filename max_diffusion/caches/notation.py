"""How a cache with its options is written: in JSON, and on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from ..core.json_values import WrongTypeError, typed
from ..core.report import plain
from ..errors import RequestError
from .config import AbstractCacheConfig
from .converters import CONVERTERS
from .registry import CACHES

_ALL: Final = "all"
_WORDS: Final[Mapping[object, str]] = MappingProxyType(
    {tuple[int, ...] | str: "a list of step indices or a policy"}
)


def cache_from_options(
    name: str, options: Mapping[str, object] | None = None, where: str = "cache"
) -> AbstractCacheConfig:
    """Creates a cache's configuration from its name and options as JSON has them.

    Args:
        name: Name of one of :data:`CACHES`.
        options: Values by option; a list is taken for a tuple. ``None`` for the
            defaults.
        where: Where they were given, for messages.

    Raises:
        RequestError: No such name or option, or a value out of range.
    """
    kind = _kind(name, where)
    hints, known = get_type_hints(kind), _options(kind)
    values: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key not in known:
            raise _no_such_option(where, name, key, known)
        values[key] = _from_json(f"{name}: {key}", value, hints[key])
    return kind(**values)


def cache_from_text(
    name: str,
    options: Sequence[str],
    where: str = "--cache",
    where_options: str = "--cache-option",
) -> AbstractCacheConfig:
    """Creates a cache's configuration from its name and ``key=value`` options.

    Args:
        name: Name of one of :data:`CACHES`.
        options: ``key=value`` each.
        where: Where the name was given, for messages.
        where_options: Where the options were given, for messages.

    Raises:
        RequestError: No such name or option, an option that is there twice, or a value
            that is none or out of range.
    """
    kind = _kind(name, where)
    hints, known = get_type_hints(kind), _options(kind)
    values: dict[str, Any] = {}
    for option in options:
        key, separator, text = option.partition("=")
        if not separator:
            raise RequestError(
                f"{where_options}: expected key=value, got {option!r:.80}"
            )
        if key not in known:
            raise _no_such_option(where_options, name, key, known)
        if key in values:
            raise RequestError(f"{where_options}: {key} is given twice; give it once")
        convert, expected = CONVERTERS[hints[key]]
        try:
            values[key] = convert(text)
        except (ValueError, KeyError) as err:
            raise RequestError(
                f"{where_options}: {key} must be {expected}, got {text!r:.80}"
            ) from err
    return kind(**values)


def caches_from_text(
    text: str, where: str = "--caches"
) -> tuple[AbstractCacheConfig, ...]:
    """Reads caches separated by commas: ``NAME`` or ``NAME:KEY=VALUE:KEY=VALUE``.

    ``all`` stands for every cache at its defaults. A comma that no cache's name follows
    belongs to a value: in ``step-mask:compute_steps=0,5,9,auto`` are two.

    Raises:
        RequestError: As :func:`cache_from_text`.
    """
    items: list[str] = []
    for part in map(str.strip, text.split(",")):
        is_name = part == _ALL or part.partition(":")[0] in CACHES
        if items and ":" in items[-1] and not is_name:
            items[-1] += f",{part}"
        else:
            items.append(part)
    found: list[AbstractCacheConfig] = []
    for item in items:
        name, *options = item.split(":")
        if item == _ALL:
            found.extend(kind() for kind in CACHES.values())
        elif name not in CACHES:
            raise RequestError(
                f"{where}: expected {_ALL}, or {', '.join(CACHES)}, got {name!r:.80}"
            )
        else:
            found.append(cache_from_text(name, options, where, where))
    return tuple(found)


def _kind(name: str, where: str) -> type[AbstractCacheConfig]:
    if name not in CACHES:
        raise RequestError(f"{where}: expected {', '.join(CACHES)}, got {name!r:.80}")
    return CACHES[name]


def _no_such_option(
    where: str, name: str, key: str, known: Sequence[str]
) -> RequestError:
    return RequestError(
        f"{where}: {name} has no option {key!r:.80}; it has "
        f"{', '.join(known) or 'none'}"
    )


def _from_json(where: str, value: object, hint: object) -> object:
    """Returns a JSON value as what an option's field of type ``hint`` holds.

    Its configuration checks it as well, but for Python: of what JSON has no name for,
    such as tuples, nobody is told who writes JSON.

    Raises:
        RequestError: It is of another type.
    """
    try:
        return typed(value, hint)
    except WrongTypeError as err:
        expected = _WORDS.get(hint, err.expected)
        raise RequestError(f"{where} must be {expected}, got {_shown(value)}") from err


def _shown(value: object) -> str:
    """Formats a value for a message as JSON has it, save for the quotes of text."""
    if isinstance(value, str):
        return repr(value)
    return json.dumps(plain(value), default=repr)


def label_of(cache: AbstractCacheConfig) -> str:
    """Returns a cache's name and non-default options, as ``--caches`` takes them."""
    defaults = vars(type(cache)())
    changed = (
        f":{key}={_written(value)}"
        for key, value in vars(cache).items()
        if value != defaults[key]
    )
    return cache.name + "".join(changed)


def _options(kind: type[AbstractCacheConfig]) -> list[str]:
    return [item.name for item in fields(kind)]


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
