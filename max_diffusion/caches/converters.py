"""How the options of caches are read from text, by the type they are declared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(",")) if text else ()


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",")) if text else ()


def _steps(text: str) -> tuple[int, ...] | str:
    """Reads step indices separated by commas, or a policy's name."""
    return _whole_numbers(text) if text[:1].isdigit() else text


CONVERTERS: Final[Mapping[object, tuple[Callable[[str], Any], str]]] = MappingProxyType(
    {
        int: (int, "a whole number"),
        float: (float, "a number"),
        str: (str, "text"),
        bool: ({"true": True, "false": False}.__getitem__, "true or false"),
        tuple[int, ...]: (_whole_numbers, "whole numbers separated by commas"),
        tuple[float, ...]: (_numbers, "numbers separated by commas"),
        tuple[int, ...] | str: (_steps, "step indices like 0,5,9 or a policy"),
    }
)
"""A converter from text for each type of option, and words for the text it expects."""
