"""What LoRA files call the modules of FLUX.1's components.

Beside diffusers' own names: Black Forest Labs', which ComfyUI's files have with dots
and Kohya's with underscores, and XLabs', whose adapters are of attention only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from ...checkpoint.lora import LoraNaming, Rows
from .names import BflRows, bfl_modules

_DOUBLE: Final = re.compile(r"transformer_blocks\.(\d+)\.attn\.(.+)")
_SINGLE: Final = re.compile(r"single_transformer_blocks\.(\d+)\.(.+)")
_CLIP_ROOT: Final = "text_model."


def _third(module: str, place: int) -> BflRows:
    return BflRows(module, ((place, place + 1),), 3)


def xlabs_place(module: str) -> BflRows | None:
    """Where XLabs' files keep a module of a transformer's attention, if they do.

    Args:
        module: By diffusers' name.
    """
    if match := _DOUBLE.fullmatch(module):
        stem, name = f"double_blocks.{match[1]}.processor", match[2]
        for stream, heads, out in (
            (1, ("to_q", "to_k", "to_v"), "to_out.0"),
            (2, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
        ):
            if name in heads:
                return _third(f"{stem}.qkv_lora{stream}", heads.index(name))
            if name == out:
                return BflRows(f"{stem}.proj_lora{stream}")
    if match := _SINGLE.fullmatch(module):
        stem, name = f"single_blocks.{match[1]}.processor", match[2]
        heads = ("attn.to_q", "attn.to_k", "attn.to_v")
        if name in heads:
            return _third(f"{stem}.qkv_lora", heads.index(name))
        if name == "proj_out":
            return BflRows(f"{stem}.proj_lora")
    return None


def transformer_places(modules: Collection[str]) -> Mapping[str, Sequence[Rows]]:
    """Where files by Black Forest Labs' and by XLabs' names have each module."""
    counts = (_count(pattern, modules) for pattern in (_DOUBLE, _SINGLE))
    original = bfl_modules(*counts)
    found: dict[str, list[Rows]] = {}
    for module in modules:
        places = (original.get(module), xlabs_place(module))
        found[module] = [place for place in places if place is not None]
    return found


def _count(pattern: re.Pattern[str], modules: Collection[str]) -> int:
    """Blocks of one kind."""
    matches = map(pattern.match, modules)
    return max((1 + int(match[1]) for match in matches if match), default=0)


def clip_places(modules: Collection[str]) -> Mapping[str, Sequence[Rows]]:
    """CLIP's modules nested as published, where the files have them flat; and back."""
    return {
        module: [
            BflRows(module.removeprefix(_CLIP_ROOT))
            if module.startswith(_CLIP_ROOT)
            else BflRows(_CLIP_ROOT + module)
        ]
        for module in modules
    }


LORA_NAMES: Final[Mapping[str, LoraNaming]] = MappingProxyType(
    {
        "transformer": LoraNaming.of(
            "transformer", is_denoiser=True, places=transformer_places
        ),
        "text_encoder": LoraNaming(
            ("text_encoder.", "text_encoders.clip_l.transformer."),
            ("lora_te1_", "lora_te_", "lora_text_encoder_"),
            clip_places,
        ),
        "text_encoder_2": LoraNaming(
            ("text_encoder_2.", "text_encoders.t5xxl.transformer."),
            ("lora_te3_", "lora_te2_", "lora_text_encoder_2_"),
        ),
    }
)
"""By component."""
