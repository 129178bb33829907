"""Texts of different lengths in one batch: padding that nobody attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from max.dtype import DType
from max.graph import Dim, TensorValue, ops

from .layers import attention, filled, merge_heads, rotate


@final
@dataclass(frozen=True)
class KeyMask:
    """Which tokens of the first of two streams are attended to, of each sample.

    What is computed for the others is of no use, but finite.
    """

    first: TensorValue
    """float32 ``(B, S_1)``: 0 at tokens that count, -1e30 at padding, which is last."""
    joint: TensorValue
    """The same of both streams, ``(B, 1, 1, S_1 + S_2)``: 0 at all of the second."""

    @classmethod
    def of(cls, first: TensorValue, second_length: Dim) -> KeyMask:
        """Makes both of the first stream's."""
        second = filled(0.0, (first.shape[0], second_length), first.device)
        joint = ops.concat([first, second], axis=1)
        return cls(first, ops.unsqueeze(ops.unsqueeze(joint, 1), 1))


def attend_padded(
    streams: Sequence[tuple[TensorValue, TensorValue, TensorValue]],
    tables: Sequence[TensorValue | None],
    scale: float,
    mask: KeyMask,
) -> list[TensorValue]:
    """Attention of two streams together on a GPU, the first of them padded.

    MAX's flash attention takes padding at the end only, so the second stream goes
    first: without a causal mask the order does not matter.

    Args:
        streams: Queries, keys and values, each ``(B, S, heads, head_dim)``.
        tables: Rotary tables, float32 ``(2, S, head_dim)``.
        scale: Factor on the scores.
        mask: Of the first stream.

    Returns:
        Of each stream ``(B, S, heads * head_dim)``, zeros at padding.
    """
    parts = []
    for (query, key, value), table in zip(streams[::-1], tables[::-1], strict=True):
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        parts.append((query, key, value))
    query, key, value = (ops.concat(each, axis=1) for each in zip(*parts, strict=True))
    zero = ops.constant(0.0, DType.float32, query.device)
    counts = ops.sum(ops.equal(mask.joint, zero).cast(DType.float32), axis=-1)
    lengths = ops.reshape(counts, (mask.first.shape[0],)).cast(DType.uint32)
    mixed = merge_heads(attention(query, key, value, scale=scale, lengths=lengths))
    second = parts[0][0].shape[1]
    of_second, of_first = mixed[:, :second, :], mixed[:, second:, :]
    # Padding is left as it was in memory, and a NaN times no weight would still be one.
    is_token = ops.unsqueeze(ops.equal(mask.first, zero), 2)
    nothing = ops.constant(0.0, of_first.dtype, query.device)
    return [ops.where(is_token, of_first, nothing), of_second]
