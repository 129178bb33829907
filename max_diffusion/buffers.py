"""Small operations on ``max.driver.Buffer`` that need no compiled graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from max.driver import CPU, Buffer, Device
from max.dtype import DType


def to_device(array: np.ndarray, device: Device) -> Buffer:
    """A copy of ``array`` on ``device``; never an alias of the caller's memory."""
    buffer = Buffer.from_numpy(np.array(array, order="C"))
    return buffer if device.is_host else buffer.to(device)


def to_numpy(buffer: Buffer) -> np.ndarray:
    """Contents as numpy, waiting for the device; bfloat16 comes as float32."""
    host = buffer if buffer.is_host else buffer.to(CPU())
    if host.dtype == DType.bfloat16:
        bits = host.view(DType.uint16, host.shape).to_numpy().astype(np.uint32)
        return (bits << 16).view(np.float32)
    return host.to_numpy()


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    odd = (bits >> 16) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> 16).astype(np.uint16)


def from_numpy(values: np.ndarray, dtype: DType, device: Device) -> Buffer:
    """float32 values on ``device`` in ``dtype``; bfloat16 is the nearest one."""
    if dtype != DType.bfloat16:
        return to_device(np.asarray(values, dtype.to_numpy()), device)
    words = to_device(bfloat16_bits(values), device)
    return words.view(dtype, words.shape)


def zeros(shape: Sequence[int], dtype: DType, device: Device) -> Buffer:
    """A zeroed buffer on ``device``."""
    return Buffer.zeros(tuple(shape), dtype, device)


def num_bytes(buffer: Buffer) -> int:
    """Bytes a buffer holds."""
    return int(buffer.num_elements) * int(buffer.element_size)


def take_rows(buffer: Buffer, rows: Sequence[int]) -> Buffer:
    """A new buffer of the given rows of axis 0."""
    shape = (len(rows), *buffer.shape[1:])
    taken = Buffer(dtype=buffer.dtype, shape=shape, device=buffer.device)
    for target, source in enumerate(rows):
        _row(taken, target).inplace_copy_from(_row(buffer, source))
    _wait_for_copies(buffer.device)
    return taken


def put_rows(target: Buffer, rows: Sequence[int], source: Buffer) -> None:
    """Overwrites the given rows of ``target`` with the rows of ``source``."""
    for index, row in enumerate(rows):
        _row(target, row).inplace_copy_from(_row(source, index))
    _wait_for_copies(target.device)


def copied(buffer: Buffer) -> Buffer:
    """A copy, done before any graph that starts after it."""
    fresh = buffer.copy()
    _wait_for_copies(buffer.device)
    return fresh


def with_rows(base: Buffer, rows: Sequence[int], source: Buffer) -> Buffer:
    """A copy of ``base`` with the given rows replaced by the rows of ``source``."""
    fresh = copied(base)
    put_rows(fresh, rows, source)
    return fresh


def repeat_rows(array: np.ndarray, count: int) -> np.ndarray:
    """Every row ``count`` times in a row, as diffusers repeats prompts."""
    return np.repeat(array, count, axis=0)


def _wait_for_copies(device: Device) -> None:
    """A GPU's queue keeps copies and graphs in order; a CPU's graphs do not wait."""
    if device.is_host:
        device.synchronize()


def _row(buffer: Buffer, index: int) -> Buffer:
    rest = (slice(None),) * (len(buffer.shape) - 1)
    return buffer[(slice(index, index + 1), *rest)]
