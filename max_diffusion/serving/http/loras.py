"""The field of a request that names LoRAs."""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ...core.loras import MAX_WEIGHT

_MOST: Final = 16
_LoraName: TypeAlias = Annotated[str, Field(min_length=1, max_length=64)]


class LoraChoice(BaseModel):
    """One LoRA of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: _LoraName
    weight: Annotated[
        float,
        Field(
            ge=-MAX_WEIGHT,
            le=MAX_WEIGHT,
            allow_inf_nan=False,
            description="1 is as it was trained.",
        ),
    ] = 1.0


def _named(value: Any) -> Any:
    """A name alone as the object that it stands for."""
    return {"name": value} if isinstance(value, str) else value


GivenLora: TypeAlias = Annotated[
    LoraChoice, BeforeValidator(_named, json_schema_input_type=_LoraName | LoraChoice)
]
GivenLoras: TypeAlias = Annotated[list[GivenLora], Field(max_length=_MOST)]
