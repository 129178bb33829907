"""``config.json`` of a component to the sizes its graphs are built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import ModelLoadError

ConfigT = TypeVar("ConfigT")


def select_fields(
    kind: type[ConfigT], config: Mapping[str, Any], where: str
) -> ConfigT:
    """The fields of a dataclass out of a larger mapping, lists as tuples.

    Args:
        kind: The dataclass.
        config: The parsed file.
        where: The component, for messages.

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
    """``value`` if it is what a field of type ``kind`` holds; sizes are positive."""
    if get_origin(kind) is tuple:
        if isinstance(value, list) and value:
            return tuple(_typed(where, item, get_args(kind)[0]) for item in value)
        wanted = "a list"
    elif kind is int:
        if type(value) is int and value > 0:
            return value
        wanted = "a whole number above 0"
    elif kind is float:
        if type(value) in (int, float):
            return float(value)
        wanted = "a number"
    else:
        if isinstance(value, kind):
            return value
        wanted = {bool: "true or false", str: "text"}[kind]
    raise ModelLoadError(f"{where} must be {wanted}, got {value!r}")
