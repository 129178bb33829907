"""The sizes of the transformer's graphs, from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs.z_image import ZImageConfig

from ...checkpoint import ComponentWeights
from ...components import causal_lm_config, causal_lm_weights, select_fields
from ...errors import ModelLoadError


def text_weights(
    config: Mapping[str, Any], weights: ComponentWeights
) -> ComponentWeights:
    """The language model's tensors, without its last layer and norm: none sees them."""
    last = causal_lm_config(config).num_hidden_layers - 1
    norm = "norm.weight", "model.norm.weight"
    return causal_lm_weights(config, weights.without(f"*layers.{last}.*", *norm))


def z_image_config(config: Mapping[str, Any]) -> ZImageConfig:
    """Returns the sizes of a ``ZImageTransformer2DModel``.

    Raises:
        ModelLoadError: It was trained for another task, or its sizes do not fit.
    """
    if config.get("siglip_feat_dim") is not None:
        raise ModelLoadError(
            "transformer: siglip_feat_dim must be null for text to image, got "
            f"{config['siglip_feat_dim']!r}: this one is for editing (Z-Image-Omni), "
            "which is not supported"
        )
    for name, only in (("all_patch_size", 2), ("all_f_patch_size", 1)):
        if list(config.get(name, [only])) != [only]:
            raise ModelLoadError(
                f"transformer: {name} must be [{only}], got {config[name]!r}"
            )
    sizes = select_fields(ZImageConfig, config, "transformer")
    if config.get("n_kv_heads", sizes.n_heads) != sizes.n_heads:
        raise ModelLoadError(
            f"transformer: n_kv_heads must be n_heads = {sizes.n_heads}, got "
            f"{config['n_kv_heads']!r}"
        )
    if sizes.dim % sizes.n_heads or sum(sizes.axes_dims) != sizes.heads.size:
        raise ModelLoadError(
            "transformer: axes_dims must add up to dim / n_heads = "
            f"{sizes.dim / sizes.n_heads:g}, got {sizes.axes_dims}"
        )
    return sizes
