"""The sizes of FLUX.2's graphs, and the tensors they ask for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from graphs.flux2 import Flux2Config

from ...checkpoint import AbstractTensor, ComponentWeights
from ...components import causal_lm_config, causal_lm_weights, select_fields
from ...errors import ModelLoadError

# What diffusers keeps in one matrix, and what graphs call its parts, from the top.
_HALVES: Final = ("gate", "up")
_FUSED: Final = ("to_q", "to_k", "to_v", *_HALVES)
_DOUBLE: Final = re.compile(r"(transformer_blocks\.\d+\.ff(?:_context)?\.)(gate|up)")
_SINGLE: Final = re.compile(
    r"(single_transformer_blocks\.\d+\.attn\.)(to_q|to_k|to_v|gate|up)"
)


def part_of(module: str) -> tuple[str, tuple[str, ...]] | None:
    """Returns the module of diffusers that holds one of ours among others, if one does.

    Returns:
        Its name, and the names of all that it holds, from the top.
    """
    if found := _SINGLE.fullmatch(module):
        stem = found[1]
        return f"{stem}to_qkv_mlp_proj", tuple(stem + part for part in _FUSED)
    if found := _DOUBLE.fullmatch(module):
        stem = found[1]
        return f"{stem}linear_in", tuple(stem + part for part in _HALVES)
    return None


def flux2_config(config: Mapping[str, Any]) -> Flux2Config:
    """Returns the sizes of a ``Flux2Transformer2DModel``.

    Raises:
        ModelLoadError: It is of another model, or its sizes do not fit each other.
    """
    for name, only in (
        ("patch_size", 1),
        ("timestep_guidance_channels", 256),
        ("eps", 1e-6),
    ):
        found = config.get(name, only)
        if found != only:
            raise ModelLoadError(
                f"transformer: {name} must be {only!r} for FLUX.2, got {found!r}"
            )
    sizes = select_fields(Flux2Config, config, "transformer")
    out_channels = config.get("out_channels")
    if out_channels not in (None, sizes.in_channels):
        raise ModelLoadError(
            f"transformer: out_channels must be in_channels = {sizes.in_channels}, got "
            f"{out_channels!r}"
        )
    axes = sizes.axes_dims_rope
    is_whole = len(axes) == 4 and not any(size % 2 for size in axes)
    if not is_whole or sum(axes) != sizes.attention_head_dim:
        raise ModelLoadError(
            "transformer: axes_dims_rope must be four even sizes that add up to "
            f"attention_head_dim = {sizes.attention_head_dim}, got {axes}"
        )
    if not sizes.rope_theta > 1:
        raise ModelLoadError(
            f"transformer: rope_theta must be above 1, got {sizes.rope_theta:g}"
        )
    return sizes


def transformer_weights(
    config: Mapping[str, Any], weights: ComponentWeights
) -> ComponentWeights:
    """The transformer's tensors, with names for the parts of fused ones."""
    sizes = flux2_config(config)
    width, hidden = sizes.heads.width, sizes.hidden_features
    rows = dict.fromkeys(_FUSED, width) | dict.fromkeys(_HALVES, hidden)

    def recipe(files: ComponentWeights, name: str) -> AbstractTensor:
        module, _, kind = name.rpartition(".")
        found = part_of(module)
        if found is None:
            return files[name]
        whole, parts = found
        shares = [rows[part.rpartition(".")[2]] for part in parts]
        return files[f"{whole}.{kind}"].split(*shares)[parts.index(module)]

    return weights.through(recipe, [each for n in weights.names for each in _made(n)])


def _made(name: str) -> list[str]:
    """What graphs ask for of a stored tensor."""
    for fused, parts in (("to_qkv_mlp_proj.", _FUSED), ("linear_in.", _HALVES)):
        stem, found, kind = name.rpartition(fused)
        if found:
            return [f"{stem}{part}.{kind}" for part in parts]
    return [name]


def text_weights(
    last: int,
) -> Callable[[Mapping[str, Any], ComponentWeights], ComponentWeights]:
    """How to find a language model's tensors without its last layers: none sees them.

    Args:
        last: The last layer whose states the transformer reads.
    """

    def transform(
        config: Mapping[str, Any], weights: ComponentWeights
    ) -> ComponentWeights:
        count = causal_lm_config(config).num_hidden_layers
        unused = [f"*layers.{index}.*" for index in range(last, count)]
        norm = (
            ("norm.weight", "model.norm.weight", "*language_model*.norm.weight")
            if count > last
            else ()
        )
        return causal_lm_weights(config, weights.without(*unused, *norm))

    return transform
