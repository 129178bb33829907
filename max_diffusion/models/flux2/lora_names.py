"""What LoRA files call the modules of FLUX.2's transformer.

Beside diffusers' names, of which some are of several of our modules: Black Forest
Labs', which ComfyUI's files have with dots and Kohya's with underscores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, final

from ...checkpoint.lora import LoraNaming, Rows
from .config import part_of

_OUTSIDE: Final = MappingProxyType(
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
)
_DOUBLE: Final = MappingProxyType(
    {
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "ff_context.linear_in": "txt_mlp.0",
        "ff_context.linear_out": "txt_mlp.2",
    }
)
_SINGLE: Final = MappingProxyType(
    {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
)
_BLOCKS: Final = (
    ("transformer_blocks", "double_blocks", _DOUBLE),
    ("single_transformer_blocks", "single_blocks", _SINGLE),
)
# Fused by Black Forest Labs, and not by diffusers.
_QKV: Final = MappingProxyType(
    {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
)
# The final modulation's halves: theirs has the shift before the scale.
_SWAPPED: Final = "norm_out.linear"


@final
@dataclass(frozen=True)
class _Rows:
    """Rows of a file's module."""

    module: str
    parts: tuple[tuple[int, int], ...] = ()
    """First row and last + 1 of each range; all, if there is none."""

    def ranges(self, num_rows: int) -> Sequence[tuple[int, int]]:
        return self.parts or ((0, num_rows),)


def transformer_places(
    shapes: Mapping[str, tuple[int, ...]],
) -> Mapping[str, Sequence[Rows]]:
    """Where files by diffusers' and by Black Forest Labs' names have each module."""
    found: dict[str, list[Rows]] = {}
    for module, shape in shapes.items():
        places: list[Rows] = []
        whole = module
        rows: tuple[tuple[int, int], ...] = ()
        if fused := part_of(module):
            whole, parts = fused
            rows = (_range(module, parts, shapes),)
            places.append(_Rows(whole, rows))
        elif module == _SWAPPED:
            half = shape[0] // 2
            rows = (half, shape[0]), (0, half)
        if (original := _original(whole)) is not None:
            places.append(_Rows(original, rows))
        elif (heads := _heads(module)) is not None:
            original, parts = heads
            places.append(_Rows(original, (_range(module, parts, shapes),)))
        found[module] = places
    return found


def _range(
    module: str, parts: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, int]:
    """First row and last + 1 of a module, of several one below the other."""
    start = sum(shapes[part][0] for part in parts[: parts.index(module)])
    return start, start + shapes[module][0]


def _original(module: str) -> str | None:
    """Black Forest Labs' name of a module of diffusers, where it is one of theirs."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    stem, _, rest = module.partition(".")
    index, _, name = rest.partition(".")
    for own, original, names in _BLOCKS:
        if stem == own and name in names:
            return f"{original}.{index}.{names[name]}"
    return None


def _heads(module: str) -> tuple[str, tuple[str, ...]] | None:
    """Their module of queries, keys and values, and all of ours in it."""
    stem, _, rest = module.partition(".")
    index, _, name = rest.partition(".")
    for original, names in _QKV.items():
        if stem == "transformer_blocks" and name in names:
            own = tuple(f"{stem}.{index}.{each}" for each in names)
            return f"double_blocks.{index}.{original}", own
    return None


LORA_NAMES: Final[Mapping[str, LoraNaming]] = MappingProxyType(
    {
        "transformer": LoraNaming.of(
            "transformer", is_denoiser=True, places=transformer_places
        )
    }
)
"""By component."""
