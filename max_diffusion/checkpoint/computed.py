"""Tensors that are computed from stored ones, in float32, when they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from max.dtype import DType

from .tensors import (
    AbstractStoredTensor,
    AbstractTensor,
    UnfitTensor,
    made_of,
    part_of_whole,
)

FLOAT8: Final = (DType.float8_e4m3fn, DType.float8_e5m2)
"""Dtypes of quantised weights that stand for numbers without a scale, too."""
# Multiplications up to which OpenBLAS uses one thread, and rows below which a product
# is too thin to be done so.
_PRODUCT: Final = 1 << 18
_MIN_ROWS: Final = 4
_DECODED: Final = (
    *(DType.float64, DType.float32, DType.float16, DType.bfloat16),
    *(*FLOAT8, DType.int8, DType.uint8),
)
# Elements looked up at once.
_CHUNK: Final = 1 << 18


def to_float32(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """The numbers that bits stand for; all but float64 exactly.

    Args:
        bits: As a tensor reads them, of any shape.
        dtype: What they are.

    Returns:
        float32 of the same shape, ``bits`` itself if that is what they are; infinity
        where float64 is beyond it.
    """
    if dtype == DType.bfloat16:
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype == DType.float8_e5m2:  # the upper half of a float16
        return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == DType.float8_e4m3fn:
        found = np.empty(bits.shape, np.float32)
        flat, numbers, values = bits.reshape(-1), found.reshape(-1), _e4m3fn_values()
        # numpy makes eight bytes of each to look it up.
        for start in range(0, flat.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            numbers[part] = values[flat[part]]
        return found
    with np.errstate(over="ignore"):
        return bits.astype(np.float32, copy=False)


def _e4m3fn_values() -> np.ndarray:
    """The number of each byte: sign, 4 bits of exponent, 3 of fraction; no infinity."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    is_normal = exponent > 0
    size = np.where(is_normal, 8 + fraction, fraction) * np.exp2(
        np.maximum(exponent, 1) - 10.0
    )
    size[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -size, size).astype(np.float32)


def is_number(dtype: DType | None) -> bool:
    """Whether tensors of a dtype can be computed with."""
    return dtype in _DECODED


def _dtype(*tensors: AbstractTensor) -> DType | None:
    """float32, or none if a tensor cannot be computed with."""
    return DType.float32 if all(is_number(t.dtype) for t in tensors) else None


def _float32(tensor: AbstractTensor) -> np.ndarray:
    return _numbers(tensor.read(), tensor.dtype)


def _numbers(bits: np.ndarray, dtype: DType | None) -> np.ndarray:
    assert dtype is not None, "checked by ComponentWeights.problems"
    return to_float32(bits, dtype)


@final
@dataclass(frozen=True, eq=False)
class Scaled(AbstractTensor):
    """Stored values times their scale, of one block of each axis the same."""

    values: AbstractTensor
    scale: AbstractTensor
    """As many axes as the values; along each one element a block, or one for all."""
    block: tuple[int, ...]
    """Elements of a block along each axis; the last one may have fewer."""

    @property
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """What values and scale are made of."""
        return made_of(self.values, self.scale)

    def read(self) -> np.ndarray:
        """``values * scale``."""
        bits, scale = self.values.read(), _float32(self.scale)
        values = _numbers(bits, self.values.dtype)
        for axis, size in enumerate(self.block):
            if size > 1 and scale.shape[axis] > 1:
                repeated = np.repeat(scale, size, axis)
                scale = repeated.take(range(self.shape[axis]), axis)
        # What was decoded is an array of our own.
        return np.multiply(values, scale, out=None if values is bits else values)

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        size, scale = self.block[axis], self.scale
        if scale.shape[axis] > 1:
            if start % size:
                return part_of_whole(self, axis, start, stop)
            scale = scale.sliced(axis, start // size, math.ceil(stop / size))
        values = self.values.sliced(axis, start, stop)
        return Scaled(values.shape, self.dtype, values, scale, self.block)


def scaled(
    values: AbstractTensor,
    scale: AbstractTensor,
    block: Sequence[int] | None = None,
) -> AbstractTensor:
    """Dequantises: ``values * scale``, float32.

    Args:
        values: Any shape; a float, float8, int8 or uint8.
        scale: One number; one a row (``(rows,)`` or ``(rows, 1)``); or one a block,
            with as many axes as the values.
        block: Elements of a block along each axis, where they do not divide the size.

    Raises:
        UnfitTensor: The scale has no shape of these.
    """
    shape, axes = values.shape, len(values.shape)
    counts = scale.shape
    if math.prod(counts) == 1:
        counts = (1,) * axes
    elif len(counts) == 1 and axes:
        counts = (*counts, *(1,) * (axes - 1))
    if block is None and len(counts) == axes:
        block = [max(1, size // n) for size, n in zip(shape, counts, strict=True) if n]
    is_fit = len(counts) == axes == len(block or ()) and all(
        count in (1, math.ceil(size / width))
        for size, count, width in zip(shape, counts, block or (), strict=True)
    )
    if not is_fit:
        raise UnfitTensor("cannot be multiplied as values and scale", values, scale)
    dtype = _dtype(values, scale)
    return Scaled(shape, dtype, values, scale.reshaped(*counts), tuple(block or ()))


@final
@dataclass(frozen=True, eq=False)
class Decoded(AbstractTensor):
    """The numbers of a quantised tensor without a scale."""

    values: AbstractTensor

    @property
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """As the values."""
        return self.values.stored

    def read(self) -> np.ndarray:
        """The numbers as float32."""
        return _float32(self.values)

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        return decoded(self.values.sliced(axis, start, stop))


def decoded(values: AbstractTensor) -> AbstractTensor:
    """A float, float8, int8 or uint8 as float32."""
    return Decoded(values.shape, _dtype(values), values)


@final
@dataclass(frozen=True, eq=False)
class Number(AbstractTensor):
    """One number that no tensor holds."""

    value: float

    @property
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """Nothing."""
        return ()

    def read(self) -> np.ndarray:
        """float32 ``()``."""
        return np.asarray(self.value, np.float32)

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        raise AssertionError("a number has no axis")


def number(value: float) -> AbstractTensor:
    """A number as a tensor, float32 ``()``."""
    return Number((), DType.float32, value)


@final
@dataclass(frozen=True, eq=False)
class Adapted(AbstractTensor):
    """A weight with a low-rank adapter merged into it."""

    weight: AbstractTensor
    down: AbstractTensor
    up: AbstractTensor
    alpha: AbstractTensor | None
    strength: float

    @property
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """What all of it is made of."""
        alpha = () if self.alpha is None else (self.alpha,)
        return made_of(self.weight, self.down, self.up, *alpha)

    def read(self) -> np.ndarray:
        """``weight + factor up @ down``."""
        rank = self.down.shape[0]
        factor = self.strength
        if self.alpha is not None:
            factor *= _float32(self.alpha).item() / rank
        up = _float32(self.up).reshape(-1, rank) * np.float32(factor)
        down = _float32(self.down).reshape(rank, -1)
        change = _product(up, down).reshape(self.shape)
        change += _float32(self.weight)
        return change

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        weight = self.weight.sliced(axis, start, stop)
        down, up = self.down, self.up
        if axis == 0:
            up = up.sliced(0, start, stop)
        else:
            down = down.sliced(axis, start, stop)
        return Adapted(
            weight.shape, self.dtype, weight, down, up, self.alpha, self.strength
        )


def _product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """``up @ down``, of few rows at a time where that keeps BLAS in this thread.

    Tensors are read in two threads already. Waking BLAS's own for each of the demo
    model's small products took twice the time of all of them, and four times beside
    other work.
    """
    rows = _PRODUCT // max(1, down.size)
    if rows < _MIN_ROWS:
        return up @ down
    found = np.empty((len(up), down.shape[1]), np.float32)
    for start in range(0, len(up), rows):
        stop = start + rows
        np.matmul(up[start:stop], down, out=found[start:stop])
    return found


def adapted(
    weight: AbstractTensor,
    down: AbstractTensor,
    up: AbstractTensor,
    alpha: AbstractTensor | None = None,
    strength: float = 1.0,
) -> AbstractTensor:
    """Merges a low-rank adapter: ``weight + strength alpha / rank up @ down``, float32.

    Args:
        weight: ``(features, in)``, or a convolution's ``(features, in, k, k)``.
        down: ``(rank, in)`` or ``(rank, in, k, k)``.
        up: ``(features, rank)`` or ``(features, rank, 1, 1)``.
        alpha: One number; default the rank.
        strength: Of the adapter, 1 as it was trained.

    Raises:
        UnfitTensor: The shapes are not these.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
        arXiv:2106.09685, equation 3.
    """
    rank = down.shape[0] if down.shape else 0
    ones = (1,) * (len(weight.shape) - 2)
    is_fit = (
        len(weight.shape) > 1
        and rank
        and down.shape == (rank, *weight.shape[1:])
        and up.shape == (weight.shape[0], rank, *ones)
        and (alpha is None or math.prod(alpha.shape) == 1)
    )
    pieces = [weight, down, up, *([] if alpha is None else [alpha])]
    if not is_fit:
        raise UnfitTensor("do not fit as weight, down, up and alpha", *pieces)
    return Adapted(weight.shape, _dtype(*pieces), weight, down, up, alpha, strength)
