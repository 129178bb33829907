"""JSON's values as the types that fields are declared with."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

from max_diffusion.core.json_values import WrongTypeError, typed

Steps = tuple[int, ...] | str
Policy = Literal["slow", "fast"]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("true", bool, True),
        ("3", int, 3),
        ("-3", int, -3),
        ("3", float, 3.0),
        ("1e-3", float, 1e-3),
        ('"a"', str, "a"),
        ("[]", tuple[int, ...], ()),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("[1, 2.5]", tuple[float, ...], (1.0, 2.5)),
        ('["a"]', tuple[str, ...], ("a",)),
        ("[0, 5]", Steps, (0, 5)),
        ('"slow"', Steps, "slow"),
        ('"slow"', Policy, "slow"),
        ("null", float | None, None),
        ("1", float | None, 1.0),
        ("1", int | float, 1),
    ],
)
def test_what_fits_is_taken(text: str, kind: Any, value: object) -> None:
    found = typed(json.loads(text), kind)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, tuple):
        assert isinstance(found, tuple)
        assert [type(item) for item in found] == [type(item) for item in value]


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("1", bool, "true or false"),
        ("true", int, "a whole number"),
        ("2.0", int, "a whole number"),
        ('"2"', int, "a whole number"),
        ("true", float, "a number"),
        ('"0.5"', float, "a number"),
        ("null", float, "a number"),
        ("1" + "0" * 400, float, "a number that float64 can hold"),
        ("3", str, "text"),
        ("3", tuple[int, ...], "a list of whole numbers"),
        ("[1, 2.0]", tuple[int, ...], "a list of whole numbers"),
        ("[[1]]", tuple[int, ...], "a list of whole numbers"),
        ("[true]", tuple[float, ...], "a list of numbers"),
        ("{}", Steps, "a list of whole numbers or text"),
        ('"other"', Policy, "one of slow, fast"),
        ("3", Policy, "one of slow, fast"),
        ('"a"', float | None, "a number or null"),
    ],
)
def test_what_does_not_is_told(text: str, kind: Any, expected: str) -> None:
    with pytest.raises(WrongTypeError) as caught:
        typed(json.loads(text), kind)
    assert caught.value.expected == expected
