"""Tensors read in another dtype, and what to blame where they are not finite in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from max.dtype import DType

from ..core.buffers import bfloat16_bits
from .computed import Adapted, to_float32
from .reading import short_name
from .tensors import AbstractStoredTensor, AbstractTensor, made_of

FLOATS: Final = (DType.float64, DType.float32, DType.float16, DType.bfloat16)
"""Dtypes that are cast to any other of them."""
# Elements checked at once: bounds the temporary mask to 4 MiB.
_CHUNK: Final = 1 << 22
# Likewise rounded to bfloat16, for which there are several such.
_ROUNDED: Final = 1 << 18


def read_as(
    tensor: AbstractTensor, dtype: DType, *, check_finite: bool = True
) -> tuple[np.ndarray, bool]:
    """A tensor's bits in a dtype, and whether they are finite as far as is checked."""
    # What overflows is told by its name instead.
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.asarray(tensor.read(), order="C")
        found = _cast_bits(bits, tensor.dtype, dtype)
    # Both: rounding to bfloat16 makes numbers of some NaN.
    is_finite = not check_finite or (
        _is_finite(bits, tensor.dtype)
        and (not _may_overflow(tensor.dtype, dtype) or _is_finite(found, dtype))
    )
    return found, is_finite


def _may_overflow(dtype: DType | None, wanted: DType) -> bool:
    """Whether finite numbers may be none once they are cast."""
    if dtype is None or dtype == wanted:
        return False
    return wanted.size_in_bytes <= dtype.size_in_bytes


def blamed(
    tensor: AbstractTensor, dtype: DType
) -> tuple[str, str, Sequence[AbstractStoredTensor]]:
    """Why a tensor is not finite in a dtype: the problem, what to do, and what of."""
    while isinstance(tensor, Adapted):
        if read_as(tensor.weight, dtype)[1]:
            halves = made_of(tensor.down, tensor.up)
            problem = f"are beyond {dtype.name} with lora {_files(halves)} merged"
            return problem, "give it less weight, or give another", halves
        tensor = tensor.weight
    stored = tensor.stored
    if tensor.dtype is not None and read_as(tensor, tensor.dtype)[1]:
        advice = f"{_files(stored)} is damaged, or for a wider dtype"
        return f"hold numbers beyond {dtype.name}", advice, stored
    advice = f"{_files(stored)} is damaged: download it again"
    return "hold NaN or infinity", advice, stored


def _files(stored: Sequence[AbstractStoredTensor]) -> str:
    return ", ".join(dict.fromkeys(short_name(item.file) for item in stored))


def _is_finite(bits: np.ndarray, dtype: DType | None) -> bool:
    """Whether all exponents are below the one of NaN and infinity."""
    if dtype not in FLOATS:
        return True
    bits = bits.reshape(-1)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        if dtype == DType.bfloat16:
            if (part & np.uint16(0x7F80) == 0x7F80).any():
                return False
        elif not np.isfinite(part).all():
            return False
    return True


def _cast_bits(bits: np.ndarray, dtype: DType | None, wanted: DType) -> np.ndarray:
    """Bits in another dtype; bfloat16 as uint16, which numpy has in its place."""
    if wanted == DType.bfloat16:
        if dtype == DType.bfloat16:
            return bits
        flat, found = bits.reshape(-1), np.empty(bits.shape, np.uint16)
        for start in range(0, flat.size, _ROUNDED):
            part = slice(start, start + _ROUNDED)
            numbers = flat[part].astype(np.float32, copy=False)
            found.reshape(-1)[part] = bfloat16_bits(numbers)
        return found
    if dtype == DType.bfloat16:
        bits = to_float32(bits, dtype)
    return bits.astype(wanted.to_numpy(), copy=False)
