"""Options that only some models have: declared once, read everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from pydantic import ValidationError

from max_diffusion import RequestError, RequestOptions, option
from max_diffusion.core.options import DeclaredOption, declared_options, read_options
from max_diffusion.pipelines.families import declared_by_all
from max_diffusion.serving.http.schemas import request_model


@dataclass(frozen=True)
class Video(RequestOptions):
    frames: int | None = option("pictures in a row", minimum=1, maximum=81)
    strength: float | None = option("0 to 1", minimum=0.0, maximum=1.0)
    tone: str | None = option("a word")
    loops: bool | None = option("whether it begins again")


def test_declarations_are_found_in_their_order() -> None:
    found = declared_options(Video)
    assert list(found) == ["frames", "strength", "tone", "loops"]
    assert found["frames"] == DeclaredOption("frames", int, "pictures in a row", 1, 81)
    assert [declared.kind for declared in found.values()] == [int, float, str, bool]
    assert declared_options(RequestOptions) == {}


def test_what_is_given_is_read_and_the_rest_is_the_models() -> None:
    given = {"frames": 81, "strength": 1, "tone": "é", "loops": False}
    assert read_options(Video, given, "V") == Video(81, 1.0, "é", False)
    assert read_options(Video, {"frames": None}, "V") == Video()
    assert read_options(RequestOptions, {"frames": None}, "V") == RequestOptions()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"fps": 8},
            "fps is no option of V; it has frames, strength, tone, loops",
        ),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"frames": 82}, "frames must be at most 81, got 82"),
        ({"frames": 2.0}, "frames must be a whole number, got 2.0"),
        ({"frames": True}, "frames must be a whole number, got True"),
        ({"strength": 1.5}, "strength must be at most 1, got 1.5"),
        ({"strength": float("nan")}, "strength must be a finite number, got nan"),
        ({"tone": 3}, "tone must be text, got int"),
        ({"tone": "\ud800"}, "tone: expected UTF-8 text"),
        ({"loops": 1}, "loops must be true or false, got 1"),
    ],
)
def test_what_a_model_does_not_take_is_refused_by_name(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        read_options(Video, given, "V")
    assert str(caught.value).startswith(f"request: {message}")


def test_a_model_without_options_says_so() -> None:
    with pytest.raises(RequestError, match="frames is no option of V; it has none"):
        read_options(RequestOptions, {"frames": 3}, "V")


@dataclass(frozen=True)
class OfAnotherType(RequestOptions):
    sizes: tuple[int, ...] | None = option("sides")


@dataclass(frozen=True)
class Bare(RequestOptions):
    frames: int | None = None


@dataclass(frozen=True)
class Needed(RequestOptions):
    frames: int = field(default=3, metadata={"help": "a"})


@dataclass(frozen=True)
class Taken(RequestOptions):
    seed: int | None = option("of what?")


@pytest.mark.parametrize("kind", [OfAnotherType, Bare, Needed])
def test_a_malformed_declaration_is_an_error(kind: type[RequestOptions]) -> None:
    with pytest.raises(RequestError, match=rf"{kind.__name__}\.\w+: expected a field"):
        declared_options(kind)


def test_a_setting_of_every_model_cannot_be_declared() -> None:
    with pytest.raises(RequestError, match=r"Taken\.seed: .* choose another"):
        declared_options(Taken, frozenset({"seed"}))


def test_the_packages_families_declare_theirs() -> None:
    found = declared_by_all()["max_sequence_length"]
    assert (found.kind, found.minimum, found.maximum) == (int, 1, 512)


def test_a_body_has_the_options_as_fields() -> None:
    body = request_model(declared_options(Video))
    schema = body.model_json_schema()["properties"]
    assert schema["frames"]["description"] == "Pictures in a row."
    assert schema["frames"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 81,
    }
    given = {"frames": 9, "loops": True}
    read = body.model_validate({"prompt": "x", **given})
    assert read.options() == given
    for wrong in ({"frames": 0}, {"frames": 1.5}, {"strength": float("inf")}):
        with pytest.raises(ValidationError):
            body.model_validate({"prompt": "x", **wrong})


@dataclass(frozen=True)
class OfABody(RequestOptions):
    size: str | None = option("another one")


def test_an_option_with_the_name_of_a_field_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"size: .* rename it"):
        request_model(declared_options(OfABody))
