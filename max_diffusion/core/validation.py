"""Checks of single values that callers give."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsIndex, TypeVar

import numpy as np

from ..errors import RequestError

T = TypeVar("T")


def whole(
    where: str,
    value: SupportsIndex,
    minimum: int | None = None,
    maximum: int | None = None,
) -> int:
    """Returns ``value`` as an integer; a float or text is an error, not rounded."""
    if isinstance(value, bool):
        raise RequestError(f"{where} must be a whole number, got {value}")
    try:
        number = operator.index(value)
    except TypeError as err:
        raise RequestError(f"{where} must be a whole number, got {value!r}") from err
    if minimum is not None and number < minimum:
        raise RequestError(f"{where} must be at least {minimum}, got {number}")
    if maximum is not None and number > maximum:
        raise RequestError(f"{where} must be at most {maximum}, got {number}")
    return number


def count(where: str, value: int, minimum: int = 0, maximum: int | None = None) -> int:
    """Returns ``value`` if it is an ``int``; NumPy's would wrap around when used."""
    if type(value) is not int:
        raise RequestError(f"{where} must be an int, got {value!r}")
    return whole(where, value, minimum, maximum)


def one_of(where: str, value: str, choices: Sequence[str]) -> str:
    """Returns ``value`` if it is one of the choices, else raises RequestError."""
    if value not in choices:
        raise RequestError(f"{where} must be {', '.join(choices)}, got {value!r}")
    return value


def not_negative(where: str, value: float) -> float:
    """Returns ``value`` as a float of 0 or more that float32 can hold."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(
        value, bool
    )
    if not is_number or not 0 <= value <= float(np.finfo(np.float32).max):
        raise RequestError(f"{where} must be a number of 0 or more, got {value!r}")
    return float(value)


def text(where: str, value: str) -> str:
    """Returns ``value`` if it is text that UTF-8 can write."""
    if not isinstance(value, str):
        raise RequestError(f"{where} must be text, got {type(value).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{where}: expected UTF-8 text, got {value!r}")
    return value


def finite(where: str, value: float) -> float:
    """Returns ``value`` as a float that is finite, also in float32."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(
        value, bool
    )
    if not is_number or not abs(value) <= float(np.finfo(np.float32).max):
        raise RequestError(f"{where} must be a finite number, got {value!r}")
    return float(value)


def numbers(
    where: str, values: tuple[float, ...], check: Callable[[str, float], float]
) -> tuple[float, ...]:
    """Returns ``values`` if it is a tuple and each value passes ``check``."""
    if not isinstance(values, tuple):
        raise RequestError(f"{where} must be a tuple of numbers, got {values!r}")
    return tuple(check(f"{where}: each", value) for value in values)


def ordered(where: str, low: float, high: float) -> None:
    """Raises RequestError for an empty range: unless ``low`` is below ``high``."""
    if not finite(f"{where}: min_timestep", low) < finite(
        f"{where}: max_timestep", high
    ):
        raise RequestError(
            f"{where}: min_timestep must be below max_timestep, got {low} and {high}"
        )


def as_tuple(name: str, values: Iterable[T]) -> tuple[T, ...]:
    """Returns any iterable of a request's setting ``name`` as a tuple."""
    try:
        return tuple(values)
    except TypeError as err:
        raise RequestError(
            f"request: {name} must be a sequence, got {type(values).__name__}"
        ) from err


def as_texts(
    name: str, given: str | Sequence[str] | None
) -> str | tuple[str, ...] | None:
    """Returns one text as it is, several as a tuple; the request refuses the rest."""
    if given is None or isinstance(given, str):
        return given
    return as_tuple(name, given)
