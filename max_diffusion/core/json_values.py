"""JSON's values as the Python type that a field is declared with."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

# How a type is called in messages, alone and in a list.
_WORDS: dict[object, tuple[str, str]] = {
    bool: ("true or false", "true and false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    NoneType: ("null", "nulls"),
}


class WrongTypeError(ValueError):
    """Says that a value is not of the type asked for.

    Args:
        expected: Words for what was expected, such as ``a list of numbers``.
    """

    def __init__(self, expected: str) -> None:
        super().__init__(expected)
        self.expected = expected


def typed(value: object, kind: Any) -> Any:
    """Returns a JSON value as a field of type ``kind`` holds it.

    Lists become tuples, and numbers of a ``float`` field become floats. ``True`` is no
    number, and ``2.0`` no whole one.

    Args:
        value: From ``json.loads``.
        kind: ``bool``, ``int``, ``float``, ``str``, ``tuple`` of any number of one of
            these, a ``Literal`` of texts, or a union of such types and ``None``.

    Raises:
        WrongTypeError: The value is of another type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return typed(value, part)
            except WrongTypeError:
                continue
    elif origin is Literal:
        if value in parts:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            try:
                return tuple(typed(item, parts[0]) for item in value)
            except WrongTypeError as err:
                raise WrongTypeError(_expected(kind)) from err
    elif kind is float:
        if type(value) in (int, float):
            try:
                return float(value)  # type: ignore[arg-type]  # one of these
            except OverflowError as err:
                raise WrongTypeError("a number that float64 can hold") from err
    elif type(value) is (NoneType if kind is None else kind):
        return value
    raise WrongTypeError(_expected(kind))


def _expected(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_expected, parts))
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is tuple:
        return f"a list of {_WORDS[parts[0]][1]}"
    return _WORDS[kind][0]
