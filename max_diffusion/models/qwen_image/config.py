"""The sizes of the graphs, from the components' ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs.autoencoder_qwen_image import QwenImageDecoderConfig
from graphs.qwen_image import QwenImageConfig

from ...checkpoint import AbstractTensor, ComponentWeights
from ...components import select_fields
from ...errors import ModelLoadError

# Switches of transformers that were trained for something else, and what for.
_OTHERS = {
    "guidance_embeds": "distilled guidance",
    "zero_cond_t": "editing (Qwen-Image-Edit-2511)",
    "use_additional_t_cond": "layers (Qwen-Image-Layered)",
    "use_layer3d_rope": "layers (Qwen-Image-Layered)",
}


def qwen_image_config(config: Mapping[str, Any]) -> QwenImageConfig:
    """Returns the sizes of a ``QwenImageTransformer2DModel``.

    Raises:
        ModelLoadError: It was trained for another task, or its sizes do not fit.
    """
    for name, task in _OTHERS.items():
        if config.get(name):
            raise ModelLoadError(
                f"transformer: {name} must be false for text to image, got "
                f"{config[name]!r}: this one is for {task}, which is not supported"
            )
    known = {name: value for name, value in config.items() if value is not None}
    if config.get("out_channels") is None and isinstance(known.get("in_channels"), int):
        known["out_channels"] = known["in_channels"]
    sizes = select_fields(QwenImageConfig, known, "transformer")
    if sum(sizes.axes_dims_rope) != sizes.attention_head_dim:
        raise ModelLoadError(
            f"transformer: axes_dims_rope must add up to attention_head_dim "
            f"{sizes.attention_head_dim}, got {sizes.axes_dims_rope}"
        )
    return sizes


def decoder_config(config: Mapping[str, Any]) -> QwenImageDecoderConfig:
    """Returns the sizes of an ``AutoencoderKLQwenImage``.

    Raises:
        ModelLoadError: Sizes are missing or do not fit each other.
    """
    if config.get("attn_scales"):
        raise ModelLoadError(
            "vae: attn_scales must be empty, got "
            f"{config['attn_scales']!r}; use the autoencoder as it was published"
        )
    if config.get("input_channels", 3) != 3:
        raise ModelLoadError(
            "vae: input_channels must be 3, got "
            f"{config['input_channels']!r}; layers of RGBA are not supported"
        )
    known = dict(config)
    for name in ("latents_mean", "latents_std"):
        if isinstance(known.get(name), list):
            known[name] = [float(x) if type(x) is int else x for x in config[name]]
    sizes = select_fields(QwenImageDecoderConfig, known, "vae")
    counts = {len(sizes.latents_mean), len(sizes.latents_std), sizes.z_dim}
    if len(counts) > 1:
        raise ModelLoadError(
            f"vae: latents_mean and latents_std must have z_dim = {sizes.z_dim} "
            f"values each, got {len(sizes.latents_mean)} and {len(sizes.latents_std)}"
        )
    steps = config.get("temperal_downsample", [False] * (len(sizes.dim_mult) - 1))
    if len(steps) != len(sizes.dim_mult) - 1:
        raise ModelLoadError(
            "vae: temperal_downsample must have one value less than dim_mult, got "
            f"{len(steps)} and {len(sizes.dim_mult)}"
        )
    return sizes


def picture_weights(
    config: Mapping[str, Any], weights: ComponentWeights
) -> ComponentWeights:
    """The autoencoder's tensors as its decoder has them on a single frame.

    Of filters the last slice in time, all others seeing zeros; norms as plain vectors.
    """

    def recipe(files: ComponentWeights, name: str) -> AbstractTensor:
        tensor = files[name]
        if len(tensor.shape) == 5:
            outputs, inputs, frames, *kernel = tensor.shape
            last = tensor.sliced(2, frames - 1, frames)
            return last.reshaped(outputs, inputs, *kernel)
        if name.endswith(".gamma"):
            return tensor.reshaped(tensor.shape[0])
        return tensor

    return weights.through(recipe)
