"""What the operations for CPUs compute, in float64."""

from __future__ import annotations

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from scipy.special import expit, softmax

from graphs.processor import PANEL, packed_shape
from graphs.weights import WeightSlot
from max_diffusion.checkpoint.packing import packed
from max_diffusion.core.buffers import bfloat16_bits

Array = np.ndarray


def pack(matrix: Array, dtype: DType) -> Array | Buffer:
    """A float32 matrix ``(features, inputs)`` as graphs take it."""
    bits = bfloat16_bits(matrix) if dtype == DType.bfloat16 else matrix
    features, inputs = matrix.shape
    shape = packed_shape(features, inputs, dtype)
    assert shape[0] * PANEL >= len(matrix)
    return packed(WeightSlot("w", shape, dtype, is_packed=True), [bits])


def rounded(x: Array) -> Array:
    """To bfloat16 and back, as float64."""
    bits = bfloat16_bits(np.ascontiguousarray(x, np.float32)).astype(np.uint32)
    return (bits << 16).view(np.float32).astype(np.float64)


def exact(x: Array) -> Array:
    """The same as float64."""
    return x.astype(np.float64)


def activation(kind: str, x: Array) -> Array:
    """As PyTorch defines it."""
    if kind == "gelu_tanh":
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + np.tanh(inner))
    if kind == "silu":
        return x * expit(x)
    if kind == "quick_gelu":
        return x * expit(1.702 * x)
    return np.where(x < 0, 0, x) if kind == "relu" else x


def norm(kind: str, x: Array, epsilon: float) -> Array:
    """Layer or RMS norm of rows, without weights."""
    if kind == "":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def rotated(x: Array, table: Array) -> Array:
    """``(B, S, heads, size)`` by a table ``(2, S, size)``."""
    turned = np.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)
    return x * table[0][:, None] + turned * table[1][:, None]


def attention(
    tokens: list[Array],
    heads: int,
    size: int,
    scale: float,
    kind: str = "",
    norms: list[Array] | None = None,
    tables: list[Array] | None = None,
    bias: Array | None = None,
    epsilon: float = 1e-6,
) -> Array:
    """Of streams ``(B, S_i, 3 * heads * size)``: ``(B, S, heads * size)``."""
    parts: list[list[Array]] = [[], [], []]
    for index, each in enumerate(tokens):
        batch, length, _ = each.shape
        split = each.astype(np.float64).reshape(batch, length, 3, heads, size)
        for which in range(3):
            x = split[:, :, which]
            if which < 2:
                x = norm(kind, x, epsilon)
                if norms is not None:
                    x = x * norms[index][which]
                    if kind == "layer":
                        x = x + norms[index][2 + which]
                if tables is not None:
                    x = rotated(x, tables[index])
            parts[which].append(x)
    query, key, value = (np.concatenate(each, 1) for each in parts)
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if bias is not None:
        scores = scores + bias
    mixed = np.einsum("bhqk,bkhd->bqhd", softmax(scores, -1), value)
    return mixed.reshape(*mixed.shape[:2], heads * size)
