"""Modules of a FLUX.1 transformer by diffusers' names and by Black Forest Labs'.

Black Forest Labs (BFL) publish one file whose linear layers are fused where diffusers
has several: query, key and value, and in single blocks the feed-forward's first layer
with them. ComfyUI, GGUF files and most adapters name and fuse as BFL do. Each module of
diffusers is rows of one of BFL's, and together they are all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, final

_EMBEDDERS: Final = MappingProxyType(
    {"timestep": "time_in", "guidance": "guidance_in", "text": "vector_in"}
)
_HALVES: Final = MappingProxyType({"linear_1": "in_layer", "linear_2": "out_layer"})
# Of a double block's stream: BFL's name to diffusers' for image and for text.
_STREAM: Final = MappingProxyType(
    {
        "mod.lin": ("norm1.linear", "norm1_context.linear"),
        "attn.norm.query_norm": ("attn.norm_q", "attn.norm_added_q"),
        "attn.norm.key_norm": ("attn.norm_k", "attn.norm_added_k"),
        "attn.proj": ("attn.to_out.0", "attn.to_add_out"),
        "mlp.0": ("ff.net.0.proj", "ff_context.net.0.proj"),
        "mlp.2": ("ff.net.2", "ff_context.net.2"),
    }
)
_QKV: Final = MappingProxyType(
    {
        "img": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
)
_SINGLE: Final = MappingProxyType(
    {
        "norm.linear": "modulation.lin",
        "attn.norm_q": "norm.query_norm",
        "attn.norm_k": "norm.key_norm",
        "proj_out": "linear2",
    }
)
# Of linear1, in shares of the model's width.
_LINEAR1: Final = MappingProxyType(
    {
        "attn.to_q": (0, 1),
        "attn.to_k": (1, 2),
        "attn.to_v": (2, 3),
        "proj_mlp": (3, 7),
    }
)


@final
@dataclass(frozen=True)
class BflRows:
    """Rows of one of BFL's modules that are, one after the other, one of diffusers'."""

    module: str
    """BFL's name of it, such as ``double_blocks.0.img_attn.qkv``."""
    parts: tuple[tuple[int, int], ...] = ((0, 1),)
    """First share and last + 1 of each range, in diffusers' order."""
    shares: int = 1
    """Of all rows of BFL's module, of equal size."""

    def ranges(self, num_rows: int) -> tuple[tuple[int, int], ...]:
        """First row and last + 1 of each range.

        Args:
            num_rows: Of BFL's module; a multiple of :attr:`shares`.
        """
        size = num_rows // self.shares
        return tuple((start * size, stop * size) for start, stop in self.parts)


def bfl_modules(num_layers: int, num_single_layers: int) -> Mapping[str, BflRows]:
    """Where BFL keep each module of diffusers.

    Norms of query and key are modules, too: diffusers call their tensor ``weight``, BFL
    ``scale``. All others have ``weight`` and ``bias`` in both.

    Args:
        num_layers: Double blocks.
        num_single_layers: Single blocks.

    Returns:
        By diffusers' name, such as ``transformer_blocks.0.attn.to_q``.
    """
    found = {
        "x_embedder": BflRows("img_in"),
        "context_embedder": BflRows("txt_in"),
        "proj_out": BflRows("final_layer.linear"),
        # BFL's has the shift before the scale.
        "norm_out.linear": BflRows(
            "final_layer.adaLN_modulation.1", ((1, 2), (0, 1)), 2
        ),
    }
    for embedder, original in _EMBEDDERS.items():
        for half, layer in _HALVES.items():
            name = f"time_text_embed.{embedder}_embedder.{half}"
            found[name] = BflRows(f"{original}.{layer}")
    for index in range(num_layers):
        stem, own = f"double_blocks.{index}", f"transformer_blocks.{index}"
        for original, names in _STREAM.items():
            for stream, name in zip(("img", "txt"), names, strict=True):
                found[f"{own}.{name}"] = BflRows(f"{stem}.{stream}_{original}")
        for stream, fused in _QKV.items():
            for place, name in enumerate(fused):
                found[f"{own}.{name}"] = BflRows(
                    f"{stem}.{stream}_attn.qkv", ((place, place + 1),), 3
                )
    for index in range(num_single_layers):
        stem, own = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        for name, original in _SINGLE.items():
            found[f"{own}.{name}"] = BflRows(f"{stem}.{original}")
        for name, part in _LINEAR1.items():
            found[f"{own}.{name}"] = BflRows(f"{stem}.linear1", (part,), 7)
    return MappingProxyType(found)


def diffusers_modules(
    num_layers: int, num_single_layers: int
) -> Mapping[str, tuple[str, ...]]:
    """The other way: diffusers' modules that each of BFL's holds rows of."""
    found: dict[str, tuple[str, ...]] = {}
    for name, rows in bfl_modules(num_layers, num_single_layers).items():
        found[rows.module] = (*found.get(rows.module, ()), name)
    return MappingProxyType(found)
