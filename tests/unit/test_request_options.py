"""Options that only some models have: declared once, read everywhere."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import pytest
from pydantic import ValidationError

from max_diffusion import (
    RequestError,
    RequestOptions,
    TextToImagePipeline,
    option,
)
from max_diffusion.cli.main import parse
from max_diffusion.core.options import DeclaredOption, declared_options, read_options
from max_diffusion.core.setting_names import SHORT_FORMS
from max_diffusion.pipelines import families
from max_diffusion.pipelines.families import declared_by_all
from max_diffusion.serving.http.bodies import ALIASES, request_model
from max_diffusion.serving.http.schemas import ImageGenerationRequest
from max_diffusion.serving.http.video_schemas import VideoRequest


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
    assert read_options(RequestOptions, {}, "V") == RequestOptions()


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


def made_of(name: str, kind: Any, value: Any) -> type[RequestOptions]:
    """A family's options with a single one."""
    bases = (RequestOptions,)
    return make_dataclass("Made", [(name, kind, value)], bases=bases, frozen=True)


class Undecorated(RequestOptions):
    strength: float | None = option("0 to 1")


@dataclass(frozen=True)
class Stranger:
    strength: float | None = option("0 to 1")


@dataclass(frozen=True)
class Unresolved(RequestOptions):
    strength: Nowhere | None = option("0 to 1")  # type: ignore[name-defined]  # noqa: F821, RUF009


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Undecorated, "Undecorated: expected a frozen dataclass; decorate it"),
        (Stranger, "options_class: expected a subclass of RequestOptions, got <class"),
        (5, "options_class: expected a subclass of RequestOptions, got 5"),
        (None, "options_class: expected a subclass of RequestOptions, got None"),
        (RequestOptions(), "options_class: expected a subclass"),
        (Unresolved, "Unresolved: its annotations: name 'Nowhere' is not defined"),
    ],
)
def test_what_is_no_options_class_is_an_error(kind: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        declared_options(kind)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "field_"),
    [
        (int | None, option("x", minimum=9, maximum=1)),
        (float | None, option("x", minimum="a")),  # type: ignore[arg-type]
        (str | None, option("x", minimum=1)),
        (bool | None, option("x", maximum=1)),
        (int | None, option("x", minimum=True)),
        (int | None, option(" ")),
        (int | None, option(5)),  # type: ignore[arg-type]
    ],
)
def test_a_range_that_is_none_is_an_error(kind: Any, field_: Any) -> None:
    made = made_of("level", kind, field_)
    with pytest.raises(RequestError, match=r"Made\.level: expected"):
        declared_options(made)


def test_names_that_mean_something_else_are_taken() -> None:
    """On the command line, over HTTP, in Python and in reports."""
    words = vars(parse(["generate", "a"]))
    kinds = ImageGenerationRequest, VideoRequest
    public = {n for kind in kinds for n in dir(kind) if not n.startswith("_")}
    keywords = set(inspect.signature(TextToImagePipeline.generate).parameters)
    assert "max_sequence_length" not in keywords
    for name in ({*words} | public | keywords | {*ALIASES, *SHORT_FORMS.values()}) - {
        "max_sequence_length"
    }:
        made = make_dataclass(
            "Made",
            [(name, int | None, option("x"))],
            bases=(RequestOptions,),
            frozen=True,
        )
        with pytest.raises(RequestError, match="choose another"):
            declared_options(made, families._TAKEN)
    for name in ("no_sound", "model_size", "Upper"):
        made = make_dataclass(
            "Made",
            [(name, int | None, option("x"))],
            bases=(RequestOptions,),
            frozen=True,
        )
        with pytest.raises(RequestError, match="choose another"):
            declared_options(made, families._TAKEN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steps", "did you mean num_inference_steps? it has frames"),
        ("num_images", "did you mean num_images_per_prompt? it has"),
        ("negative_promt", "did you mean negative_prompt? it has"),
        ("frame", "did you mean frames? it has"),
        ("zzz", "; it has frames"),
    ],
)
@pytest.mark.parametrize("value", [3, None])
def test_what_may_have_been_meant_is_said(
    name: str, message: str, value: int | None
) -> None:
    with pytest.raises(RequestError) as caught:
        read_options(Video, {name: value}, "V")
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [OfAnotherType, Bare, Needed])
def test_a_malformed_declaration_is_an_error(kind: type[RequestOptions]) -> None:
    with pytest.raises(RequestError, match=rf"{kind.__name__}\.\w+: expected a field"):
        declared_options(kind)


def test_a_setting_of_every_model_cannot_be_declared() -> None:
    with pytest.raises(RequestError, match=r"Taken\.seed: .* choose another"):
        declared_options(Taken, frozenset({"seed"}))


def test_the_packages_families_declare_theirs() -> None:
    found = declared_by_all()["max_sequence_length"]
    # The widest: FLUX.1's ends at 512, Qwen-Image's at 1024.
    assert (found.kind, found.minimum, found.maximum) == (int, 1, 1024)
    # FLUX.1's three classes say it once, in the same words.
    assert found.help.startswith("text tokens that T5 reads")
    assert found.help.count("text tokens that") == 4
    assert ". Of QwenImagePipeline: text tokens" in found.help
    assert "FluxPipeline" not in found.help


def test_a_body_has_the_options_as_fields() -> None:
    body = request_model(ImageGenerationRequest, declared_options(Video))
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
        request_model(ImageGenerationRequest, declared_options(OfABody))
