"""AutoencoderKL: from images to latents and back, NHWC.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
arXiv:2112.10752; weight names are those of diffusers' ``AutoencoderKL``, and of its
``AutoencoderKLFlux2``, which scales each channel of packed latents by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

from . import convolutions, processor
from .latents import (
    clamp,
    decoder_grids,
    pack_latents,
    sized,
    to_uint8,
    unpack_latents,
)
from .layers import attention, conv2d, fused_group_norm, group_norm, linear
from .processor import TokenStream
from .weights import WeightScope


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Sizes of an autoencoder, named as in its ``config.json``."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    decoder_block_out_channels: tuple[int, ...] | None = None
    """The decoder's channels, where they are others."""
    batch_norm_eps: float | None = None
    """Of the packed latents' variances; ``None`` where one factor scales them all."""

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's blocks, pixels first."""
        return self.decoder_block_out_channels or self.block_out_channels


def decode_packed(
    config: AutoencoderKLConfig,
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
    rows, columns = grid.shape
    if config.batch_norm_eps is not None:
        mean, deviation = _statistics(config, w, config.batch_norm_eps)
        tokens = tokens * deviation + mean
    latents = unpack_latents(tokens, rows, columns)
    latents = latents / config.scaling_factor + config.shift_factor
    return to_uint8(decode(config, w, latents.cast(w.dtype), levels))


def decode(
    config: AutoencoderKLConfig,
    w: WeightScope,
    latents: TensorValue,
    levels: Sequence[TensorValue],
) -> TensorValue:
    """Decodes unscaled ``(B, h, w, C)`` to images ``(B, H, W, 3)``, about -1..1.

    ``levels`` carry the sizes of every level, see :func:`~.latents.decoder_grids`.
    """
    channels = config.latent_channels
    x = sized(latents, levels[0])
    if config.use_post_quant_conv:
        x = conv2d(w / "post_quant_conv", x, channels, channels, kernel=1)
    w = w / "decoder"
    widths = config.decoder_widths[::-1]
    x = conv2d(w / "conv_in", x, channels, widths[0])
    x = _middle(config, w / "mid_block", x)
    for index, width in enumerate(widths):
        scope = w / "up_blocks" / index
        for layer in range(config.layers_per_block + 1):
            x = _resnet(config, scope / "resnets" / layer, x, width)
        if index < len(widths) - 1:
            scope = scope / "upsamplers" / 0 / "conv"
            level = levels[index + 1]
            size = level.shape[0], level.shape[1]
            x = sized(conv2d(scope, x, width, width, doubled_to=size), level)
    return conv2d(
        w / "conv_out",
        x,
        widths[-1],
        config.out_channels,
        norm=w / "conv_norm_out",
        groups=config.norm_num_groups,
    )


def encode(
    config: AutoencoderKLConfig,
    w: WeightScope,
    picture: TensorValue,
    levels: Sequence[TensorValue],
) -> tuple[TensorValue, TensorValue]:
    """Encodes images ``(B, H, W, 3)`` in -1..1 as latents' mean and log-variance.

    Both ``(B, h, w, C)``, unscaled; the log-variance is clamped to -30..20. ``levels``
    carry the sizes of every level, as for :func:`decode` but images first.
    """
    scope = w / "encoder"
    widths = config.block_out_channels
    x = conv2d(
        scope / "conv_in", sized(picture, levels[0]), config.in_channels, widths[0]
    )
    for index, width in enumerate(widths):
        block = scope / "down_blocks" / index
        for layer in range(config.layers_per_block):
            x = _resnet(config, block / "resnets" / layer, x, width)
        if index < len(widths) - 1:
            # Padded at the bottom and right only, as the model was trained.
            down = block / "downsamplers" / 0 / "conv"
            x = conv2d(down, x, width, width, stride=2, padding=(0, 1, 0, 1))
            x = sized(x, levels[index + 1])
    x = _middle(config, scope / "mid_block", x)
    moments = 2 * config.latent_channels
    x = conv2d(
        scope / "conv_out",
        x,
        widths[-1],
        moments,
        norm=scope / "conv_norm_out",
        groups=config.norm_num_groups,
    )
    if config.use_quant_conv:
        x = conv2d(w / "quant_conv", x, moments, moments, kernel=1)
    mean, log_variance = ops.split(x, [config.latent_channels] * 2, axis=3)
    return mean, clamp(log_variance, -30.0, 20.0)


def encoder_grids(
    config: AutoencoderKLConfig, device: DeviceRef
) -> dict[str, TensorType]:
    """Returns the input types of :func:`encode_packed` that carry sizes.

    Tokens ``(rows, columns)``, then ``(height, width)`` of every level of the encoder,
    the picture's first and the latents' last; each level is half the one before.
    """
    return decoder_grids(len(config.block_out_channels), device)


def encode_packed(
    config: AutoencoderKLConfig,
    w: WeightScope,
    picture: TensorValue,
    noise: TensorValue,
    grid: TensorValue,
    *levels: TensorValue,
) -> TensorValue:
    """Draws latents of a picture, packed as the transformer takes them.

    Args:
        config: Sizes of the autoencoder.
        w: Its weights.
        picture: float32 ``(1, H, W, 3)`` in -1..1.
        noise: Standard normal, float32 ``(B, h, w, C)``: what is drawn is the mean plus
            the standard deviation times it, so that zeros give the mean.
        grid: The first input of :func:`encoder_grids`.
        levels: The other inputs of :func:`encoder_grids`.

    Returns:
        Scaled latents, float32 ``(B, rows * columns, 4 C)``.
    """
    rows, columns = grid.shape
    mean, log_variance = (
        moment.cast(DType.float32)
        for moment in encode(config, w, picture.cast(w.dtype), levels)
    )
    noise = ops.rebind(noise, (noise.shape[0], *mean.shape[1:]))
    latents = mean + ops.exp(log_variance * 0.5) * noise
    latents = (latents - config.shift_factor) * config.scaling_factor
    packed = pack_latents(latents, rows, columns)
    if config.batch_norm_eps is None:
        return packed
    center, deviation = _statistics(config, w, config.batch_norm_eps)
    return (packed - center) / deviation


def _statistics(
    config: AutoencoderKLConfig, w: WeightScope, epsilon: float
) -> tuple[TensorValue, TensorValue]:
    """Mean and standard deviation of each channel of packed latents, ``(4 C,)``."""
    channels = 4 * config.latent_channels
    mean, variance = (
        (w / "bn")(f"running_{name}", channels).cast(DType.float32)
        for name in ("mean", "var")
    )
    return mean, ops.sqrt(variance + epsilon)


def _middle(config: AutoencoderKLConfig, w: WeightScope, x: TensorValue) -> TensorValue:
    width = int(x.shape[3])
    x = _resnet(config, w / "resnets" / 0, x, width)
    if config.mid_block_add_attention:
        x = _attended(config, w / "attentions" / 0, x)
    return _resnet(config, w / "resnets" / 1, x, width)


def _attended(
    config: AutoencoderKLConfig, w: WeightScope, x: TensorValue
) -> TensorValue:
    """Adds attention of one head over all cells."""
    batch, height, width, channels = x.shape
    size, groups = int(channels), config.norm_num_groups
    names, out = ("to_q", "to_k", "to_v"), w / "to_out" / 0
    if w.products is not None:
        y = convolutions.convolution(
            x,
            w.packed([f"{name}.weight" for name in names], [size] * 3, size),
            3 * size,
            bias=w.joined([f"{name}.bias" for name in names], *[size] * 3),
            kernel=1,
            padding=(0, 0, 0, 0),
            norm=fused_group_norm(w / "group_norm", size, groups),
        )
        tokens = TokenStream(ops.reshape(y, (batch, height * width, 3 * size)))
        (mixed,) = processor.attention([tokens], 1, size, scale=size**-0.5)
        return convolutions.convolution(
            ops.reshape(mixed, x.shape),
            out.packed(["weight"], [size], size),
            size,
            bias=out.joined(["bias"], size),
            kernel=1,
            padding=(0, 0, 0, 0),
            residual=x,
        )
    y = ops.reshape(
        group_norm(w / "group_norm", x, groups), (batch, height * width, size)
    )
    query, key, value = (
        ops.unsqueeze(linear(w / name, y, size, size), 2) for name in names
    )
    mixed = ops.squeeze(attention(query, key, value, scale=size**-0.5), 2)
    return x + ops.reshape(linear(out, mixed, size, size), x.shape)


def _resnet(
    config: AutoencoderKLConfig, w: WeightScope, x: TensorValue, width: int
) -> TensorValue:
    width_in, groups = int(x.shape[3]), config.norm_num_groups
    y = conv2d(w / "conv1", x, width_in, width, norm=w / "norm1", groups=groups)
    if width_in != width:
        x = conv2d(w / "conv_shortcut", x, width_in, width, kernel=1)
    x = ops.rebind(x, y.shape)
    return conv2d(
        w / "conv2", y, width, width, norm=w / "norm2", groups=groups, residual=x
    )
