"""An ``AutoencoderKL`` by the names of latent diffusion, which single files keep."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from ..checkpoint import AbstractTensor, ComponentWeights
from .autoencoder_kl import autoencoder_config

_ATTENTION: Final = MappingProxyType(
    {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
)


def is_ldm(weights: ComponentWeights) -> bool:
    """Whether an autoencoder's tensors are named so, and not as diffusers does."""
    return any(name.startswith("decoder.mid.") for name in weights.tensors)


def from_ldm(config: Mapping[str, Any], weights: ComponentWeights) -> ComponentWeights:
    """Tensors by diffusers' names.

    Up blocks are numbered from the other end, and attention's matrices are convolutions
    of one pixel.

    Args:
        config: The autoencoder's ``config.json``.
        weights: By the names of latent diffusion.
    """
    levels = len(autoencoder_config(config).block_out_channels)

    def recipe(files: ComponentWeights, name: str) -> AbstractTensor:
        module, _, kind = name.rpartition(".")
        tensor = files[f"{_ldm_module(module, levels)}.{kind}"]
        if ".attentions." in module and tensor.shape[2:] == (1, 1):
            return tensor.reshaped(*tensor.shape[:2])
        return tensor

    return weights.through(recipe)


def _ldm_module(module: str, levels: int) -> str:
    """A module's name; its own where both are the same."""
    half, *path = module.split(".")
    match path:
        case ["conv_norm_out"]:
            return f"{half}.norm_out"
        case ["mid_block", "resnets", index, *rest]:
            return f"{half}.mid.block_{int(index) + 1}.{_in_block(rest)}"
        case ["mid_block", "attentions", "0", *rest]:
            name = ".".join(rest)
            return f"{half}.mid.attn_1.{_ATTENTION.get(name, name)}"
        case ["down_blocks", level, "resnets", index, *rest]:
            return f"{half}.down.{level}.block.{index}.{_in_block(rest)}"
        case ["down_blocks", level, "downsamplers", "0", *rest]:
            return f"{half}.down.{level}.downsample.{'.'.join(rest)}"
        case ["up_blocks", level, "resnets", index, *rest]:
            level = str(levels - 1 - int(level))
            return f"{half}.up.{level}.block.{index}.{_in_block(rest)}"
        case ["up_blocks", level, "upsamplers", "0", *rest]:
            level = str(levels - 1 - int(level))
            return f"{half}.up.{level}.upsample.{'.'.join(rest)}"
    return module


def _in_block(path: list[str]) -> str:
    return ".".join("nin_shortcut" if p == "conv_shortcut" else p for p in path)
