"""The decoder of Qwen-Image's video autoencoder, for pictures, NHWC.

The autoencoder of Wan 2.1 (arXiv:2503.20314), its decoder trained further for
Qwen-Image (arXiv:2508.02324); weight names are those of diffusers'
``AutoencoderKLQwenImage``. Of a single frame its causal convolutions see zeros at all
times but the last, so their filters' last slices are a picture's network; what is
between frames (``time_conv``) is unused. Weights are asked for as that network has
them: filters with two axes, norms with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from max.dtype import DType
from max.graph import TensorValue, ops

from . import processor
from .latents import clamp, sized, to_uint8, unpack_latents
from .layers import attention, conv2d
from .processor import TokenStream
from .weights import WeightScope

# diffusers divides by the channels' length, at least 1e-12; the mean square plus this
# differs from that for lengths of that order only, and leaves zeros zeros as well.
_EPSILON = 1e-24


@dataclass(frozen=True)
class QwenImageDecoderConfig:
    """Sizes of an autoencoder, named as in its ``config.json``."""

    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the decoder's levels, latents first and images last."""
        return tuple(self.base_dim * factor for factor in self.dim_mult[::-1])


def decode_packed(
    config: QwenImageDecoderConfig,
    w: WeightScope,
    tokens: TensorValue,
    grid: TensorValue,
    *levels: TensorValue,
) -> TensorValue:
    """Decodes packed latents as the transformer leaves them, to images.

    Args:
        config: Sizes of the autoencoder.
        w: Its weights.
        tokens: Packed latents, float32 ``(B, rows * columns, 4 C)``.
        grid: The first input of :func:`~.latents.decoder_grids`.
        levels: The other inputs of :func:`~.latents.decoder_grids`.

    Returns:
        uint8 ``(B, H, W, 3)``.
    """
    latents = unpack_latents(tokens, *grid.shape)
    mean, deviation = (
        ops.constant(list(values), DType.float32, tokens.device)
        for values in (config.latents_mean, config.latents_std)
    )
    latents = latents * deviation + mean
    return to_uint8(decode(config, w, latents.cast(w.dtype), levels))


def decode(
    config: QwenImageDecoderConfig,
    w: WeightScope,
    latents: TensorValue,
    levels: Sequence[TensorValue],
) -> TensorValue:
    """Decodes unscaled ``(B, h, w, C)`` to images ``(B, H, W, 3)`` in -1..1.

    ``levels`` carry the sizes of every level, see :func:`~.latents.decoder_grids`.
    """
    channels, widths = config.z_dim, config.widths
    x = sized(latents, levels[0])
    x = conv2d(w / "post_quant_conv", x, channels, channels, kernel=1)
    w = w / "decoder"
    x = conv2d(w / "conv_in", x, channels, widths[0])
    middle = w / "mid_block"
    x = _resnet(middle / "resnets" / 0, x, widths[0])
    x = _attended(middle / "attentions" / 0, x)
    x = _resnet(middle / "resnets" / 1, x, widths[0])
    for index, width in enumerate(widths):
        scope = w / "up_blocks" / index
        for layer in range(config.num_res_blocks + 1):
            x = _resnet(scope / "resnets" / layer, x, width)
        if index < len(widths) - 1:
            scope = scope / "upsamplers" / 0 / "resample" / 1
            level = levels[index + 1]
            size = level.shape[0], level.shape[1]
            x = sized(conv2d(scope, x, width, width // 2, doubled_to=size), level)
    x = ops.silu(_norm(w / "norm_out", x))
    return clamp(conv2d(w / "conv_out", x, widths[-1], 3), -1.0, 1.0)


def _resnet(w: WeightScope, x: TensorValue, width: int) -> TensorValue:
    width_in = int(x.shape[3])
    y = conv2d(w / "conv1", ops.silu(_norm(w / "norm1", x)), width_in, width)
    if width_in != width:
        x = conv2d(w / "conv_shortcut", x, width_in, width, kernel=1)
    x = ops.rebind(x, y.shape)
    y = ops.silu(_norm(w / "norm2", y))
    return conv2d(w / "conv2", y, width, width, residual=x)


def _attended(w: WeightScope, x: TensorValue) -> TensorValue:
    """Adds attention of one head over all cells."""
    batch, height, width, channels = x.shape
    size, cells = int(channels), height * width
    y = conv2d(w / "to_qkv", _norm(w / "norm", x), size, 3 * size, kernel=1)
    y = ops.reshape(y, (batch, cells, 3 * size))
    if w.products is not None:
        (mixed,) = processor.attention([TokenStream(y)], 1, size, scale=size**-0.5)
    else:
        parts = ops.split(y, [size] * 3, axis=2)
        query, key, value = (ops.unsqueeze(part, 2) for part in parts)
        mixed = ops.squeeze(attention(query, key, value, scale=size**-0.5), 2)
    mixed = ops.reshape(mixed, x.shape)
    return conv2d(w / "proj", mixed, size, size, kernel=1, residual=x)


def _norm(w: WeightScope, x: TensorValue) -> TensorValue:
    """Scales each cell's channels to the length ``sqrt(C)``, then by ``gamma``."""
    gamma = w("gamma", int(x.shape[3])).cast(DType.float32)
    return ops.rms_norm(x.cast(DType.float32), gamma, _EPSILON).cast(x.dtype)
