"""Attention as a piece of blocks, see :mod:`.pieces`: norms and rotations with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from max.graph import TensorValue, ops

from . import processor
from .layers import (
    attention,
    layer_norm,
    merge_heads,
    rms_norm,
    rotate,
    split_heads,
)
from .padding import KeyMask, attend_padded
from .pieces import cut
from .processor import Columns, TokenStream
from .weights import WeightScope


@final
@dataclass(frozen=True)
class Attending:
    """A stream of tokens that attends."""

    qkv: Sequence[Columns]
    """Queries, keys and values."""
    rotary: TensorValue | None = None
    """float32 ``(2, S, head_dim)``: cosines and sines; or ``(B, 2, S, head_dim)``."""
    norms: tuple[str, str] | None = None
    """Names of the norms of queries and keys."""


def attend(
    w: WeightScope,
    streams: Sequence[Attending],
    heads: int,
    head_dim: int,
    *,
    scale: float,
    norm: Literal["layer", "rms"] = "rms",
    epsilon: float = 1e-6,
    bias: TensorValue | None = None,
    joint_rotary: TensorValue | None = None,
    mask: KeyMask | None = None,
) -> list[TensorValue]:
    """Attention of one or two streams of tokens together, the second after the first.

    Args:
        w: Scope of the norms.
        streams: What attends.
        heads: How many.
        head_dim: Channels of each.
        scale: Factor on the scores, usually ``head_dim ** -0.5``.
        norm: Kind of the streams' norms: of each head, before the rotation.
        epsilon: Of the norms.
        bias: Added to the scaled scores, float32, ``(B or 1, heads or 1, S or 1, S)``.
        joint_rotary: The streams' rotary tables joined.
        mask: Of the keys of two streams, in place of a bias.

    Returns:
        Of each stream ``(B, S, heads * head_dim)``.
    """
    if mask is not None:
        if w.products is None and w.device.is_gpu():
            parts = [
                _heads(w, each, heads, head_dim, norm, epsilon) for each in streams
            ]
            tables = [each.rotary for each in streams]
            return attend_padded(parts, tables, scale, mask)
        bias = mask.joint
    if w.products is None:
        parts = [_heads(w, each, heads, head_dim, norm, epsilon) for each in streams]
        query, key, value = parts[0]
        if len(parts) == 2:
            both = (ops.concat(each, axis=1) for each in zip(*parts, strict=True))
            query, key, value = both
        if joint_rotary is not None:
            query, key = rotate(query, joint_rotary), rotate(key, joint_rotary)
        mixed = merge_heads(attention(query, key, value, scale=scale, bias=bias))
        if len(streams) == 1:
            return [mixed]
        return list(cut(mixed, streams[0].qkv[0].tensor.shape[1]))
    found = []
    first = streams[0]
    columns = first.qkv[0].first, first.qkv[1].first, first.qkv[2].first
    for each in streams:
        vectors = None
        if each.norms is not None:
            parts_of = ["weight", "bias"] if norm == "layer" else ["weight"]
            names = [f"{name}.{part}" for part in parts_of for name in each.norms]
            joined = w.joined(names, *[head_dim] * len(names))
            vectors = ops.reshape(joined, (len(names), head_dim))
        tokens = each.qkv[0].tensor
        assert all(part.tensor is tokens for part in each.qkv)
        assert tuple(part.first for part in each.qkv) == columns
        found.append(TokenStream(tokens, vectors, each.rotary))
    return processor.attention(
        found,
        heads,
        head_dim,
        scale=scale,
        columns=columns,
        norm="" if first.norms is None else norm,
        epsilon=epsilon,
        bias=bias,
    )


def _heads(
    w: WeightScope,
    stream: Attending,
    heads: int,
    head_dim: int,
    norm: Literal["layer", "rms"],
    epsilon: float,
) -> tuple[TensorValue, TensorValue, TensorValue]:
    """Queries, keys and values ``(B, S, heads, head_dim)``, normed."""
    query, key, value = (split_heads(each.tensor, heads) for each in stream.qkv)
    if stream.norms is not None:
        of_query, of_key = (w / name for name in stream.norms)
        if norm == "rms":
            query = rms_norm(of_query, query, head_dim, epsilon=epsilon)
            key = rms_norm(of_key, key, head_dim, epsilon=epsilon)
        else:
            query = layer_norm(query, head_dim, of_query, epsilon=epsilon)
            key = layer_norm(key, head_dim, of_key, epsilon=epsilon)
    return query, key, value
