"""The sizes of CogVideoX's graphs, from its ``config.json`` files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs.autoencoder_kl_cogvideox import CogVideoXDecoderConfig
from graphs.cogvideox import CogVideoXConfig

from ...components import require_one_of, select_fields
from ...errors import ModelLoadError


def cogvideox_config(config: Mapping[str, Any]) -> CogVideoXConfig:
    """Returns the sizes of a ``CogVideoXTransformer3DModel`` from its ``config.json``.

    Raises:
        ModelLoadError: A size is missing or makes no sense, or the model has what the
            graphs do not.
    """
    where = "transformer"
    known = dict(config)
    known["out_channels"] = config.get("out_channels") or config.get("in_channels")
    sizes = select_fields(CogVideoXConfig, known, where)
    for key, wanted in (
        ("activation_fn", "gelu-approximate"),
        ("timestep_activation_fn", "silu"),
        ("norm_elementwise_affine", True),
        ("flip_sin_to_cos", True),
        ("freq_shift", 0),
    ):
        _require(key, config.get(key, wanted), wanted)
    # Of models that start from an image.
    for key in ("ofs_embed_dim", "use_learned_positional_embeddings"):
        given = config.get(key)
        if given:
            raise ModelLoadError(
                f"{where}: {key} is {given!r}, as of models that start from an image; "
                "text to video is what is supported"
            )
    if sizes.in_channels != sizes.out_channels:
        raise ModelLoadError(
            f"{where}: in_channels {sizes.in_channels} and out_channels "
            f"{sizes.out_channels} must be the same, as of text to video; is it a "
            "model that starts from an image?"
        )
    if sizes.attention_head_dim % 16 or sizes.width % 16:
        raise ModelLoadError(
            f"{where}: attention_head_dim must be a multiple of 16, got "
            f"{sizes.attention_head_dim}"
        )
    return sizes


def decoder_config(config: Mapping[str, Any]) -> CogVideoXDecoderConfig:
    """Returns the sizes of an ``AutoencoderKLCogVideoX`` from its ``config.json``.

    Raises:
        ModelLoadError: A size is missing or makes no sense, or the model has what the
            graphs do not.
    """
    where = "vae"
    require_one_of(where, "act_fn", config.get("act_fn", "silu"), ("silu",))
    for kind in config.get("up_block_types", ()):
        require_one_of(where, "up_block_types", kind, ("CogVideoXUpBlock3D",))
    if config.get("use_post_quant_conv"):
        raise ModelLoadError(
            f"{where}: use_post_quant_conv must be false, got "
            f"{config['use_post_quant_conv']!r}; no CogVideoX model has it"
        )
    if (factor := config.get("shift_factor")) is not None:
        raise ModelLoadError(f"{where}: shift_factor must be null, got {factor!r}")
    known = {key: value for key, value in config.items() if value is not None}
    if isinstance(known.get("temporal_compression_ratio"), float):
        known["temporal_compression_ratio"] = round(known["temporal_compression_ratio"])
    sizes = select_fields(CogVideoXDecoderConfig, known, where)
    levels = len(sizes.block_out_channels)
    ratio = sizes.temporal_compression_ratio
    if ratio & (ratio - 1) or not 2 <= ratio < 2**levels:
        raise ModelLoadError(
            f"{where}: temporal_compression_ratio must be a power of 2 from 2 to "
            f"{2 ** (levels - 1)}, got {ratio}"
        )
    groups = sizes.norm_num_groups
    for width in sizes.block_out_channels:
        if width % groups:
            raise ModelLoadError(
                f"{where}: block_out_channels must be multiples of norm_num_groups "
                f"{groups}, got {width}"
            )
    return sizes


def _require(key: str, value: object, wanted: object) -> None:
    if value != wanted:
        raise ModelLoadError(f"transformer: {key} must be {wanted!r}, got {value!r}")
