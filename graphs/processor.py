"""Operations for CPUs, written in Mojo (``graphs/kernels``), as nodes of a graph.

A linear layer with what is around it, and attention from the rows that a linear layer
gives, are one operation each: MAX 26.7 runs a kernel for every part of them, copies
where heads are swapped with tokens, and computes bfloat16 on a CPU in float32.

Whatever the dtype of hidden states, norms, softmax, modulation and gates are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

PANEL: Final = 64
"""Columns of a panel of a packed matrix."""

Activation = Literal["", "gelu_tanh", "silu", "quick_gelu", "relu"]
ACTIVATIONS: Final = ("", "gelu_tanh", "silu", "quick_gelu", "relu")
NormKind = Literal["", "layer", "rms"]
_NORMS: Final = ("", "layer", "rms")


def packed_shape(features: int, inputs: int, dtype: DType) -> tuple[int, int, int]:
    """Returns the shape of a packed matrix ``(features, inputs)``.

    Panels, inputs (in pairs of bfloat16, or singly), 64 features (and of each the two
    inputs of a pair); both sizes are padded with zeros.
    """
    pair = 2 if dtype == DType.bfloat16 else 1
    return -(-features // PANEL), -(-inputs // pair), PANEL * pair


def packed_filter_shape(
    channels: int, inputs: int, kernel: int, dtype: DType
) -> tuple[int, int, int]:
    """Returns the shape of packed filters ``(channels, inputs, kernel, kernel)``.

    They are packed as the matrix ``(channels, kernel * kernel * inputs)`` of rows, in
    each its columns, in each the inputs; these are padded with zeros to whole pairs, so
    that an odd number of them becomes even in bfloat16.
    """
    inputs += inputs % 2 if dtype == DType.bfloat16 else 0
    return packed_shape(channels, kernel * kernel * inputs, dtype)


@final
@dataclass(frozen=True)
class Columns:
    """Neighbouring columns of a tensor's last axis, read where they are."""

    tensor: TensorValue
    first: int
    size: int

    @classmethod
    def all_of(cls, tensor: TensorValue) -> Columns:
        """All columns of a tensor."""
        return cls(tensor, 0, int(tensor.shape[-1]))

    @property
    def alone(self) -> TensorValue:
        """The columns as a tensor of their own, ``(B, S, size)``."""
        if int(self.tensor.shape[-1]) == self.size:
            return self.tensor
        return self.tensor[:, :, self.first : self.first + self.size]


@final
@dataclass(frozen=True)
class RowNorm:
    """``norm(x) * (offset + scale) + shift`` over the last axis."""

    kind: NormKind
    vectors: TensorValue
    """float32 ``(G, columns)``; one row serves as many rows of x as go round, so that
    ``G`` is the batch or 1."""
    scale: int
    """Column that scales begin at."""
    shift: int | None
    offset: float
    epsilon: float


@final
@dataclass(frozen=True)
class Gate:
    """``residual + gate * y``."""

    vectors: TensorValue
    """float32 ``(G, columns)``, as in :class:`RowNorm`."""
    first: int
    """Column that gates begin at."""
    residual: TensorValue
    """Like ``y``."""


def linear(
    x: Columns,
    matrix: TensorValue,
    features: int,
    *,
    bias: TensorValue | None = None,
    first: int = 0,
    beside: Columns | None = None,
    norm: RowNorm | None = None,
    activation: Activation = "",
    activated_from: int = 0,
    gate: Gate | None = None,
    dtype: DType | None = None,
) -> TensorValue:
    """Computes ``activation(norm(x) W.T + b)``, gated and added to a residual.

    Args:
        x: Inputs ``(..., K)``.
        matrix: Packed, see :func:`packed_shape`; its dtype is that of the products.
        features: How many columns of the matrix are computed.
        bias: float32, of all columns of the matrix.
        first: First column of the matrix that is computed.
        beside: Further inputs, which follow those of ``x``; they are not normed.
        norm: Of ``x`` before.
        activation: Of the sums.
        activated_from: Column of the result that the activation begins at.
        gate: Of the result, and what it is added to. Both want the same norm's vectors
            where there is a norm, too.
        dtype: Of the result; that of ``x`` by default.

    Returns:
        ``(..., features)``.
    """
    device = x.tensor.device
    dtype = dtype or x.tensor.dtype
    columns = [x] if beside is None else [x, beside]
    for each in columns:
        assert 0 <= each.first <= int(each.tensor.shape[-1]) - each.size
    vectors = None if norm is None else norm.vectors
    if gate is not None:
        assert vectors is None or vectors is gate.vectors
        vectors = gate.vectors
        assert gate.residual.dtype == dtype, "the residual is of the result's dtype"
    settings = [
        x.first,
        x.size,
        0 if beside is None else beside.first,
        0 if beside is None else beside.size,
        first,
        ACTIVATIONS.index(activation),
        activated_from,
        0 if norm is None else _NORMS.index(norm.kind),
        bits_of(0.0 if norm is None else norm.epsilon),
        bits_of(0.0 if norm is None else norm.offset),
        0 if norm is None else norm.scale,
        -1 if norm is None or norm.shift is None else norm.shift,
        -1 if gate is None else gate.first,
    ]
    lead = list(x.tensor.shape)[:-1]
    rows = _flat(x.tensor)
    inputs = [
        rows,
        nothing_of(x.tensor.dtype, 2, device)
        if beside is None
        else _flat(beside.tensor),
        matrix,
        nothing_of(DType.float32, 1, device) if bias is None else bias,
        nothing_of(DType.float32, 2, device) if vectors is None else vectors,
        nothing_of(dtype, 2, device) if gate is None else _flat(gate.residual),
        settings_of(settings, device),
    ]
    result = TensorType(dtype, (rows.shape[0], features), device)
    y = ops.custom("diffusion_linear", device, inputs, [result])[0].tensor
    return ops.reshape(y, (*lead, features))


@final
@dataclass(frozen=True)
class TokenStream:
    """Tokens that attend, with what is done to their queries and keys."""

    tokens: TensorValue
    """``(B, S, columns)``, as a linear layer wrote them."""
    norm: TensorValue | None = None
    """float32 ``(2, size)``, factors of queries and of keys; for layer norms also what
    is added to each, ``(4, size)``."""
    rotary: TensorValue | None = None
    """float32 ``(2, S, size)``: cosines and sines, each for both of a pair; of samples
    with positions of their own ``(B, 2, S, size)``."""


def attention(
    streams: Sequence[TokenStream],
    heads: int,
    size: int,
    *,
    scale: float,
    columns: tuple[int, int, int] | None = None,
    norm: NormKind = "",
    epsilon: float = 1e-6,
    bias: TensorValue | None = None,
) -> list[TensorValue]:
    """Attention of one or two streams of tokens together, the second after the first.

    Args:
        streams: What attends.
        heads: How many.
        size: Channels of a head.
        scale: Factor on the scores, usually ``size ** -0.5``.
        columns: Where queries, keys and values begin; side by side by default.
        norm: Of each head's query and key, before they are rotated.
        epsilon: Of the norm.
        bias: Added to the scaled scores, float32, ``(B or 1, heads or 1, S or 1, S)``.

    Returns:
        Of each stream ``(B, S, heads * size)``.
    """
    assert len(streams) in (1, 2)
    # One for all: the operation is told once.
    assert len({each.norm is None for each in streams}) == 1
    assert len({each.rotary is None for each in streams}) == 1
    assert (streams[0].norm is None) == (norm == "")
    width = heads * size
    device = streams[0].tokens.device
    settings = [
        *(columns or (0, width, 2 * width)),
        heads,
        _NORMS.index(norm),
        bits_of(epsilon),
        int(streams[0].rotary is not None),
        bits_of(scale),
    ]
    nothing = nothing_of(DType.float32, 2, device)
    norms = [nothing if each.norm is None else each.norm for each in streams]
    nothing = nothing_of(DType.float32, 3, device)
    tables = [
        nothing if each.rotary is None else _of_samples(each.rotary) for each in streams
    ]
    tokens = [each.tokens for each in streams]
    results = [
        TensorType(each.dtype, (*list(each.shape)[:2], width), device)
        for each in tokens
    ]
    inputs = [
        *tokens,
        *norms,
        *tables,
        nothing_of(DType.float32, 4, device) if bias is None else bias,
        settings_of(settings, device),
    ]
    name = "diffusion_attention" if len(streams) == 1 else "diffusion_joint_attention"
    mixed = ops.custom(name, device, inputs, results, parameters={"size": size})
    return [each.tensor for each in mixed]


def _of_samples(rotary: TensorValue) -> TensorValue:
    """Tables one after the other, as the operation takes them."""
    if rotary.rank == 3:
        return rotary
    batch, both, length, size = rotary.shape
    return ops.reshape(rotary, (batch * both, length, size))


def _flat(x: TensorValue) -> TensorValue:
    """``(..., columns)`` to rows."""
    if len(x.shape) == 2:
        return x
    *lead, columns = x.shape
    rows = lead[0]
    for dim in lead[1:]:
        rows = rows * dim
    return ops.reshape(x, (rows, columns))


def bits_of(number: float) -> int:
    """Returns a float32's bits as an int32."""
    return int(np.float32(number).view(np.int32))


def settings_of(values: Sequence[int], device: DeviceRef) -> TensorValue:
    """Returns numbers as an operation is given them."""
    return ops.constant(np.array(values, np.int32), DType.int32, device)


def nothing_of(dtype: DType, rank: int, device: DeviceRef) -> TensorValue:
    """Returns what stands for a tensor that an operation is not given."""
    one = ops.constant(0, dtype, device)
    return ops.broadcast_to(one, (0,) * rank)
