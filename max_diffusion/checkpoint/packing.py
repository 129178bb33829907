"""Matrices laid out for products on a CPU: ``graphs.processor.packed_shape``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from max.driver import Buffer
from max.dtype import DType

from graphs.processor import PANEL
from graphs.weights import WeightSlot

# A cache line: a vector that begins in one and ends in the next takes twice as long.
_ALIGNMENT: Final = 64


def packed(slot: WeightSlot, parts: Iterable[np.ndarray]) -> np.ndarray | Buffer:
    """Packs matrices, one below the other.

    Args:
        slot: Their slot.
        parts: Of its dtype, bfloat16 as uint16, each ``(rows, columns)``, or a filter
            ``(channels, inputs, k, k)``. Taken one after the other, so that each may
            be made when its turn comes.

    Returns:
        An array of the slot's shape and dtype.
    """
    is_half = slot.dtype == DType.bfloat16
    panels, lanes, _ = slot.shape
    whole = _aligned((panels, lanes, PANEL), np.dtype(np.uint32))
    row = 0
    for part in (_as_matrix(part, is_half) for part in parts):
        lines = _lanes(part) if is_half else part.view(np.uint32)
        done = 0
        while done < len(lines):
            panel, start = divmod(row, PANEL)
            count = min(PANEL - start, len(lines) - done)
            whole[panel, :, start : start + count] = lines[done : done + count].T
            row, done = row + count, done + count
    if used := row % PANEL:
        whole[-1, :, used:] = 0
    if is_half:
        bits = whole.view(np.uint16)
        return Buffer.from_numpy(bits).view(DType.bfloat16, slot.shape)
    return whole.view(np.float32)


def _as_matrix(part: np.ndarray, is_half: bool) -> np.ndarray:
    """A filter's channels by its rows, columns and inputs; these in whole lanes."""
    if part.ndim == 2:
        return part
    part = part.transpose(0, 2, 3, 1)
    if is_half and part.shape[3] % 2:
        part = np.pad(part, ((0, 0), (0, 0), (0, 0), (0, 1)))
    return np.ascontiguousarray(part).reshape(len(part), -1)


def _lanes(bits: np.ndarray) -> np.ndarray:
    """Pairs of neighbouring bfloat16 as one number, the last one padded with zero."""
    if bits.shape[1] % 2:
        bits = np.pad(bits, ((0, 0), (0, 1)))
    return np.ascontiguousarray(bits).view(np.uint32)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose first element begins a cache line."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
