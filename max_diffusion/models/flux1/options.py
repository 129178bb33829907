"""What requests may set on FLUX.1 models only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...core.options import RequestOptions, option
from ...core.request import MAX_SIZE

MAX_TEXT_TOKENS: Final = 512
"""Longest T5 input the published models were trained on."""


@dataclass(frozen=True)
class Flux1Options(RequestOptions):
    """Options of every FLUX.1 model."""

    max_sequence_length: int | None = option(
        "text tokens that T5 reads, padding included; default: the model's most. It "
        "changes the picture: FLUX.1-schnell is usually run at 256",
        minimum=1,
        maximum=MAX_TEXT_TOKENS,
    )


@dataclass(frozen=True)
class Flux1KontextOptions(Flux1Options):
    """Options of FLUX.1-Kontext beside them."""

    auto_resize: bool | None = option(
        "whether the reference picture is scaled to the nearest in shape of the sizes "
        "that FLUX.1-Kontext was trained with, all of about a megapixel; default: yes. "
        "If not, it keeps its size, rounded down"
    )
    max_area: int | None = option(
        "pixels of what is drawn: height and width are scaled to it in their shape and "
        "rounded down, as by diffusers; default: as they are",
        minimum=1,
        maximum=MAX_SIZE**2,
    )
