"""The sizes of a component's graphs, from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from ..core.json_values import WrongTypeError, typed
from ..errors import ModelLoadError

ConfigT = TypeVar("ConfigT")


def select_fields(
    kind: type[ConfigT], config: Mapping[str, Any], where: str
) -> ConfigT:
    """Creates a dataclass from its fields in a larger mapping, lists as tuples.

    Args:
        kind: The dataclass.
        config: The parsed file.
        where: Name of the component, for messages.

    Raises:
        ModelLoadError: A field without a default is missing, or one has another type.
    """
    values, hints = {}, get_type_hints(kind)
    for item in fields(kind):  # type: ignore[arg-type]  # every caller's is one
        if item.name in config:
            values[item.name] = _typed(
                f"{where}: config.json's {item.name}",
                config[item.name],
                hints[item.name],
            )
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ModelLoadError(
                f"{where}: config.json has no {item.name}; is it the configuration of "
                "this component?"
            )
    return kind(**values)


def require_one_of(where: str, key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a setting that the graphs do not know.

    Raises:
        ModelLoadError: ``value`` is none of the choices.
    """
    if value not in choices:
        raise ModelLoadError(
            f"{where}: {key} must be {' or '.join(choices)}, got {value!r}"
        )


def _typed(where: str, value: Any, kind: Any) -> Any:
    """Returns ``value`` if a field of type ``kind`` holds it; sizes are positive."""
    try:
        found = typed(value, kind)
    except WrongTypeError as err:
        raise ModelLoadError(f"{where} must be {err.expected}, got {value!r}") from err
    sizes = found if isinstance(found, tuple) else (found,)
    if not sizes or any(type(size) is int and size < 1 for size in sizes):
        raise ModelLoadError(f"{where} must be above 0, got {value!r}")
    return found
