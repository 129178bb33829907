"""What every body that asks for something to be drawn has in common."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from ...core.noise import MAX_SEED
from ...core.options import DeclaredOption
from ...core.request import MAX_SIZE, MAX_STEPS
from ...core.setting_names import SHORT_FORMS
from ...engine import MAX_PRIORITY
from ...errors import RequestError
from .loras import GivenLoras

_SIZE: Final = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {**SHORT_FORMS, "num_images_per_prompt": "n"}
)
"""Our fields by the names that they have in diffusers, and in servers after it."""
FIXES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "background": "no picture is transparent",
        "quality": "steps and cache set it",
        "seconds": 'write it as "4" or "4.125"',
    }
)
"""Words that an error adds where a field has a value that is not allowed, by field."""


class TwoNamesError(ValueError):
    """Says that one setting is given by two names, and that they differ."""

    def __init__(self, param: str, one: object, second: str, other: object) -> None:
        super().__init__(
            f"{param}: is the same as {second}, but they are given as {shown(one)} and "
            f"{shown(other)}; leave one out"
        )
        self.param = param


def also(name: str) -> AliasChoices:
    """Returns the names of a field, its own first."""
    return AliasChoices(name, *(a for a, field in ALIASES.items() if field == name))


class DrawingRequest(BaseModel):
    """Fields of every body: of OpenAI's those that pictures and videos share, and ours.

    Ours (``extra_body`` in OpenAI's client) also go by diffusers' names. What asks for
    something else than is drawn here is refused, not ignored.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    others: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Fields of other servers that would have no effect, and what to do instead."""
    option_names: ClassVar[frozenset[str]] = frozenset()
    """Fields that :func:`request_model` has added."""

    prompt: Annotated[str, Field(min_length=1, description="What to draw.")]
    model: Annotated[
        str | None, Field(description="Id of the served model; may be left out.")
    ] = None
    size: Annotated[
        str | None,
        Field(
            pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
            description="WIDTHxHEIGHT in pixels, or auto for the model's own.",
        ),
    ] = None
    user: Annotated[
        str | None, Field(description="Label of the caller's own; of no effect.")
    ] = None
    safety_identifier: Annotated[
        str | None, Field(description="OpenAI's newer name of user.")
    ] = None
    seed: Annotated[
        int | None,
        Field(
            ge=-1,
            le=MAX_SEED,
            description="Of the noise; random if left out or -1, and then told.",
        ),
    ] = None
    width: Annotated[
        int | None,
        Field(ge=1, le=MAX_SIZE, description="Pixels, instead of size."),
    ] = None
    height: Annotated[
        int | None,
        Field(ge=1, le=MAX_SIZE, description="Pixels, instead of size."),
    ] = None
    steps: Annotated[
        int | None,
        Field(
            ge=1,
            le=MAX_STEPS,
            validation_alias=also("steps"),
            description="Denoising steps; the model's if left out. Or "
            "num_inference_steps.",
        ),
    ] = None
    guidance: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            validation_alias=also("guidance"),
            description="Guidance scale of guidance-distilled models; default the "
            "model's. Or "
            "guidance_scale.",
        ),
    ] = None
    true_cfg: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            validation_alias=also("true_cfg"),
            description="Classifier-free guidance, against negative_prompt; 1 is off; "
            "the model's if left out. Or true_cfg_scale.",
        ),
    ] = None
    negative_prompt: str | None = None
    cache: Annotated[
        str | None, Field(description="Denoising cache: a name GET /v1/models lists.")
    ] = None
    cache_options: Annotated[
        dict[str, Any] | None, Field(description="Settings of that cache.")
    ] = None
    loras: Annotated[
        GivenLoras | None,
        Field(
            description="LoRAs that GET /v1/models lists: names, or objects with a "
            "name and a weight."
        ),
    ] = None
    priority: Annotated[
        int | None, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="0.")
    ] = None
    timeout: Annotated[
        float | None,
        Field(
            ge=1,
            allow_inf_nan=False,
            description="Seconds after which there is an error instead.",
        ),
    ] = None
    report: Annotated[
        bool | None,
        Field(description="Tells what every step did, too."),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _merge_names(cls, data: Any) -> Any:
        """Leaves one name of each field; drops other servers' fields that are null."""
        if not isinstance(data, dict):
            return data
        given = {k: v for k, v in data.items() if v is not None or k not in cls.others}
        for alias, name in ALIASES.items():
            if alias not in given or name not in given:
                continue
            if given[name] is None:
                del given[name]
            elif given[alias] is None or _is_same(given[alias], given[name]):
                del given[alias]
            else:
                raise TwoNamesError(alias, given[alias], name, given[name])
        return given

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if _SIZE.fullmatch(self.size or ""):
            for name, pixels in zip(("width", "height"), self.pixels(), strict=True):
                other = getattr(self, name)
                if other is not None and other != pixels:
                    raise TwoNamesError(name, other, "size", self.size)
        return self

    def pixels(self) -> tuple[int | None, int | None]:
        """Returns width and height in pixels, ``None`` where not given."""
        match = _SIZE.fullmatch(self.size or "")
        if match is None:
            return self.width, self.height
        return int(match[1]), int(match[2])

    def options(self) -> dict[str, object]:
        """Returns what is given of the options that only some models have."""
        names = self.option_names
        return {k: v for k, v in self if k in names and v is not None}


def _is_same(one: object, other: object) -> bool:
    """Whether two values of JSON are equal; ``true`` is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def shown(value: object) -> str:
    """Formats a value of a body for a message.

    It is written as JSON has it, save for the quotes of text, and cut to 80 characters.
    """
    is_text = isinstance(value, str)
    text = repr(value) if is_text else json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"


def field_names(body: type[DrawingRequest]) -> tuple[str, ...]:
    """Returns all names that a request may use."""
    fields = body.model_fields
    return (*fields, *(alias for alias, name in ALIASES.items() if name in fields))


_Body = TypeVar("_Body", bound=DrawingRequest)


def request_model(
    base: type[_Body], options: Mapping[str, DeclaredOption]
) -> type[_Body]:
    """Creates a body's schema with the options that only some models have.

    Args:
        base: The schema without them.
        options: The options, by name.

    Raises:
        RequestError: One of them has the name of a field.
    """
    found: dict[str, Any] = {}
    for name, declared in options.items():
        if name in base.model_fields or name in ALIASES:
            raise RequestError(
                f"{name}: an option of a model family has the name of a field of every "
                "request; rename it"
            )
        description = f"{declared.help[:1].upper()}{declared.help[1:]}."
        is_number = declared.kind in (int, float)
        limits: dict[str, Any] = {
            "ge": declared.minimum,
            "le": declared.maximum,
            "allow_inf_nan": False if declared.kind is float else None,
        }
        given = {k: v for k, v in limits.items() if is_number and v is not None}
        found[name] = (
            Annotated[declared.kind | None, Field(description=description, **given)],
            None,
        )
    made = create_model(
        base.__name__,
        __base__=base,
        __doc__=base.__doc__,
        **found,
    )
    made.option_names = frozenset(found)
    return made
