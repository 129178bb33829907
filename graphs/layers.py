"""The layers all models share, as functions of a weight scope and tensors.

Norms, softmax and time embeddings run in float32 whatever the model's dtype.
"""

from __future__ import annotations

import math

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorValue, ops

from . import convolutions, processor
from .processor import Activation, Columns
from .weights import WeightScope


def linear(
    w: WeightScope,
    x: TensorValue,
    in_features: int,
    features: int,
    *,
    bias: bool = True,
    activation: Activation = "",
    dtype: DType | None = None,
) -> TensorValue:
    """``activation(x @ weight.T + bias)`` over the last axis.

    Args:
        w: Scope of ``weight``, ``(features, in_features)``, and ``bias``.
        x: Any floats ``(..., in_features)``.
        in_features: Columns of ``x``.
        features: Columns of the result.
        bias: Whether there is one.
        activation: Of the sums.
        dtype: Of the result; the scope's by default.
    """
    dtype = dtype or w.dtype
    if w.products is not None:
        return processor.linear(
            Columns.all_of(x),
            w.packed(["weight"], [features], in_features),
            features,
            bias=w.joined(["bias"], features) if bias else None,
            activation=activation,
            dtype=dtype,
        )
    y = x.cast(w.dtype) @ ops.transpose(w("weight", features, in_features), 0, 1)
    if bias:
        y = y + w("bias", features)
    return activated(y, activation).cast(dtype)


def activated(x: TensorValue, activation: Activation) -> TensorValue:
    """The activation of every element."""
    if activation == "gelu_tanh":
        return ops.gelu(x, approximate="tanh")
    if activation == "silu":
        return ops.silu(x)
    if activation == "quick_gelu":
        return x * ops.sigmoid(x * 1.702)
    if activation == "relu":
        return ops.relu(x)
    return x


def layer_norm(
    x: TensorValue, width: int, w: WeightScope | None = None, *, epsilon: float = 1e-6
) -> TensorValue:
    """Layer norm over the last axis in float32, affine if a scope is given."""
    if w is None:
        gamma = filled(1.0, (width,), x.device)
        beta = filled(0.0, (width,), x.device)
    else:
        gamma = w("weight", width).cast(DType.float32)
        beta = w("bias", width).cast(DType.float32)
    return ops.layer_norm(x.cast(DType.float32), gamma, beta, epsilon).cast(x.dtype)


def rms_norm(
    w: WeightScope, x: TensorValue, width: int, *, epsilon: float = 1e-6
) -> TensorValue:
    """RMS norm over the last axis in float32 with a learned scale."""
    weight = w("weight", width).cast(DType.float32)
    return ops.rms_norm(x.cast(DType.float32), weight, epsilon).cast(x.dtype)


def timestep_embedding(
    timesteps: TensorValue, channels: int, *, factor: float | None = None
) -> TensorValue:
    """Sinusoidal embedding, cosines first: ``(B,)`` to float32 ``(B, channels)``.

    ``[cos(t f_i), sin(t f_i)]`` with ``f_i = 10000 ** (-2 i / channels)``, in the
    timestep's own unit (0..1000 for FLUX).

    Args:
        timesteps: Numbers to embed.
        channels: Columns of the result.
        factor: What the angles ``t f_i`` are multiplied by, after they are rounded:
            1000 where a model is told sigma.
    """
    half = channels // 2
    # Exponents rounded to float32, as diffusers does and models are trained with: more
    # exact frequencies would turn the angles by up to 5e-4 rad at t = 1000.
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32)
    exponent = (exponent / np.float32(half)).astype(np.float64)
    frequencies = ops.constant(
        np.exp(exponent).astype(np.float32), DType.float32, timesteps.device
    )
    angles = ops.unsqueeze(timesteps.cast(DType.float32), 1) * frequencies
    if factor is not None:
        angles = angles * factor
    return ops.concat([ops.cos(angles), ops.sin(angles)], axis=1)


def attention(
    query: TensorValue,
    key: TensorValue,
    value: TensorValue,
    *,
    scale: float,
    bias: TensorValue | None = None,
    lengths: TensorValue | None = None,
) -> TensorValue:
    """Softmax attention, all of ``(B, S, heads, head_dim)``, result likewise.

    On GPU without a bias this is MAX's flash attention, which has no CPU version; the
    other cases are two batched matrix products around a float32 softmax.

    Args:
        query: Queries ``(B, S, heads, head_dim)``.
        key: Keys ``(B, T, heads, head_dim)``.
        value: Values ``(B, T, heads, head_dim)``.
        scale: Factor on the scores, usually ``head_dim ** -0.5``.
        bias: Added to the scaled scores, float32, broadcast to ``(B, heads, S, T)``.
        lengths: uint32 ``(B,)``: how many of the first tokens of each sample count, on
            a GPU and without a bias. The others' results are undefined.
    """
    if bias is None and query.device.is_gpu():
        # Imported here: its first import builds a Mojo extension for this CPU, in
        # seconds, and into site-packages, which may be read-only.
        from max.nn.attention.mask_config import MHAMaskVariant
        from max.nn.kernels import flash_attention_gpu

        return flash_attention_gpu(
            query,
            key,
            value,
            mask_variant=MHAMaskVariant.NULL_MASK,
            scale=scale,
            valid_length=lengths,
        )
    q = ops.permute(query, [0, 2, 1, 3])  # B, heads, S, head_dim
    k = ops.permute(key, [0, 2, 3, 1])  # B, heads, head_dim, T
    v = ops.permute(value, [0, 2, 1, 3])  # B, heads, T, head_dim
    scores = (q @ k).cast(DType.float32) * scale
    if bias is not None:
        scores = scores + bias
    mixed = ops.softmax(scores).cast(value.dtype) @ v
    return ops.permute(mixed, [0, 2, 1, 3])


def rotate(x: TensorValue, rotary: TensorValue) -> TensorValue:
    """Rotates neighbouring channel pairs of ``(B, S, heads, head_dim)`` in float32.

    Args:
        x: Queries or keys.
        rotary: Cosines and sines, float32 ``(2, S, head_dim)``; of samples with
            positions of their own ``(B, 2, S, head_dim)``.
    """
    if rotary.rank == 4:
        rotary = ops.permute(rotary, [1, 0, 2, 3])
    table = ops.unsqueeze(rotary, rotary.rank - 1)  # 2, (B,) S, 1, head_dim
    head_dim = int(x.shape[3])
    # (a, b) to (-b, a) for every pair. A product with 0 and 1 is exact, and on CPU an
    # order of magnitude faster than taking every second channel.
    turn = np.zeros((head_dim, head_dim), np.float32)
    even = np.arange(0, head_dim, 2)
    turn[even + 1, even], turn[even, even + 1] = -1, 1
    turned = x @ ops.constant(turn, DType.float32, x.device).cast(x.dtype)
    rotated = x.cast(DType.float32) * table[0] + turned.cast(DType.float32) * table[1]
    return rotated.cast(x.dtype)


def split_heads(x: TensorValue, heads: int) -> TensorValue:
    """``(B, S, D)`` to ``(B, S, heads, D / heads)``."""
    batch, length, width = x.shape
    return ops.reshape(x, (batch, length, heads, int(width) // heads))


def merge_heads(x: TensorValue) -> TensorValue:
    """``(B, S, heads, head_dim)`` to ``(B, S, heads * head_dim)``."""
    batch, length, heads, head_dim = x.shape
    return ops.reshape(x, (batch, length, int(heads) * int(head_dim)))


def filled(
    value: float, shape: tuple[int | Dim, ...], device: DeviceRef
) -> TensorValue:
    """A float32 tensor of one value."""
    return ops.broadcast_to(ops.constant(value, DType.float32, device), shape)


def conv2d(
    w: WeightScope,
    x: TensorValue,
    channels_in: int,
    channels: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    norm: WeightScope | None = None,
    groups: int = 0,
    doubled_to: tuple[Dim, Dim] | None = None,
    residual: TensorValue | None = None,
) -> TensorValue:
    """Convolution of NHWC ``x``, and what is around it.

    Args:
        w: Scope of ``weight``, ``(channels, channels_in, kernel, kernel)``, and
            ``bias``.
        x: ``(B, H, W, channels_in)``.
        channels_in: Channels of ``x``.
        channels: Of the result.
        kernel: Height and width of the filter.
        stride: Pixels from one filter's place to the next.
        padding: Zeros at the top, bottom, left and right.
        norm: Scope of a group norm of ``x`` before, with SiLU after it.
        groups: Of the norm.
        doubled_to: Height and width after each pixel is repeated, to four; plain
            dimensions, which MAX wants in what compiles once for several places.
        residual: What is added to the result.

    Returns:
        ``(B, H', W', channels)``.
    """
    if kernel == 1:
        padding = (0, 0, 0, 0)
    if w.products is not None:
        return convolutions.convolution(
            x,
            w.packed_filter("weight", channels, channels_in, kernel),
            channels,
            bias=w.joined(["bias"], channels),
            kernel=kernel,
            stride=stride,
            padding=padding,
            norm=None if norm is None else fused_group_norm(norm, channels_in, groups),
            silu=norm is not None,
            upsample=doubled_to is not None,
            residual=residual,
        )
    if norm is not None:
        x = ops.silu(group_norm(norm, x, groups))
    if doubled_to is not None:
        x = ops.rebind(_doubled(x), (x.shape[0], *doubled_to, channels_in))
    y = _plain_conv2d(w, x, channels_in, channels, kernel, stride, padding)
    return y if residual is None else residual + y


def _plain_conv2d(
    w: WeightScope,
    x: TensorValue,
    channels_in: int,
    channels: int,
    kernel: int,
    stride: int,
    padding: tuple[int, int, int, int],
) -> TensorValue:
    """By MAX's operation.

    A subgraph of its own: fused with what follows, every place of a network would get a
    convolution kernel of its own, and each takes 10 to 20 s to compile.
    """
    weight = w("weight", channels, channels_in, kernel, kernel)
    bias = w("bias", channels)
    if kernel == 1:
        # A product of matrices, which compiles in half the time.
        matrix = ops.reshape(weight, (channels, channels_in))
        return x @ ops.transpose(matrix, 0, 1) + bias
    # An expression of weights only: folded when they are loaded.
    weight = ops.permute(weight, [2, 3, 1, 0])
    name = f"conv_{channels_in}_{channels}_{kernel}_{stride}"
    inputs = [x, weight, bias]
    return w.call(
        name,
        inputs,
        lambda x, weight, bias: ops.conv2d(
            x, weight, stride=(stride, stride), padding=padding, bias=bias
        ),
    )


def _doubled(x: TensorValue) -> TensorValue:
    """Repeats every pixel four times: ``(B, h, w, C)`` to ``(B, 2h, 2w, C)``."""
    batch, height, width, channels = x.shape
    x = ops.reshape(x, (batch, height, 1, width, 1, channels))
    x = ops.broadcast_to(x, (batch, height, 2, width, 2, channels))
    return ops.reshape(x, (batch, height * 2, width * 2, channels))


def fused_group_norm(
    w: WeightScope, channels: int, groups: int, epsilon: float = 1e-6
) -> convolutions.GroupNorm:
    """Returns a group norm as what a convolution does before its product."""
    gamma, beta = w.joined(["weight"], channels), w.joined(["bias"], channels)
    return convolutions.GroupNorm(groups, gamma, beta, epsilon)


def group_norm(
    w: WeightScope, x: TensorValue, groups: int, *, epsilon: float = 1e-6
) -> TensorValue:
    """Group norm of NHWC ``x`` in float32, affine."""
    channels = x.shape[3]
    centred, scale = group_moments(x, groups, epsilon)
    weight = w("weight", int(channels)).cast(DType.float32)
    bias = w("bias", int(channels)).cast(DType.float32)
    return ops.reshape(centred * (scale * weight) + bias, x.shape).cast(x.dtype)


def group_moments(
    x: TensorValue, groups: int, epsilon: float
) -> tuple[TensorValue, TensorValue]:
    """Moments of groups of channels over all pixels of a sample, in float32.

    Args:
        x: ``(B, H, W, C)``.
        groups: How many.
        epsilon: Added to the variance.

    Returns:
        ``x`` less its mean, ``(B, H * W, C)``, and one over its standard deviation,
        ``(B, 1, C)``.
    """
    batch, height, width, channels = x.shape
    size = int(channels) // groups

    def mean(value: TensorValue) -> TensorValue:
        # Over positions first: taking both at once is ten times slower on CPU, where
        # only whole rows of channels are read as vectors.
        of_channels = ops.reshape(ops.mean(value, axis=1), (batch, groups, size))
        of_groups = ops.mean(of_channels, axis=2)  # B, groups, 1
        spread = ops.broadcast_to(of_groups, (batch, groups, size))
        return ops.reshape(spread, (batch, 1, channels))

    flat = ops.reshape(x.cast(DType.float32), (batch, height * width, channels))
    centred = flat - mean(flat)
    return centred, ops.rsqrt(mean(centred * centred) + epsilon)
