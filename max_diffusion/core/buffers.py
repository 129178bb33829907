"""Small operations on ``max.driver.Buffer`` that need no compiled graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np
from max.driver import CPU, Buffer, Device
from max.dtype import DType


def to_device(array: np.ndarray, device: Device) -> Buffer:
    """Copies ``array`` to ``device``; the copy never aliases the caller's memory."""
    buffer = Buffer.from_numpy(np.array(array, order="C"))
    return buffer if device.is_host else buffer.to(device)


def to_numpy(buffer: Buffer) -> np.ndarray:
    """Returns a buffer's contents, waiting for the device; bfloat16 as float32."""
    host = buffer if buffer.is_host else buffer.to(CPU())
    if host.dtype == DType.bfloat16:
        bits = host.view(DType.uint16, host.shape).to_numpy().astype(np.uint32)
        return (bits << 16).view(np.float32)
    return host.to_numpy()


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Rounds float32 to the bits of the nearest bfloat16, uint16, ties to even."""
    bits = values.view(np.uint32)
    odd = (bits >> 16) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> 16).astype(np.uint16)


def from_numpy(values: np.ndarray, dtype: DType, device: Device) -> Buffer:
    """Copies float32 values to ``device`` in ``dtype``, rounded to the nearest."""
    if dtype != DType.bfloat16:
        return to_device(np.asarray(values, dtype.to_numpy()), device)
    words = to_device(bfloat16_bits(values), device)
    return words.view(dtype, words.shape)


def place_steps(
    values: Iterable[float], batch: int, device: Device
) -> tuple[Buffer, ...]:
    """Copies what each step takes to ``device``, once for all steps.

    Between two graphs every array made costs as much as dozens made at once, because
    the caches of a CPU hold nothing but the graphs' data then.

    Args:
        values: Value of every step, the same for all samples; rounded to float32.
        batch: Number of samples.
        device: Device of the graphs.

    Returns:
        A buffer of each step, float32 ``(B,)``.
    """
    return tuple(
        to_device(np.full(batch, value, np.float32), device) for value in values
    )


def zeros(shape: Sequence[int], dtype: DType, device: Device) -> Buffer:
    """Creates a buffer of zeros on ``device``."""
    return Buffer.zeros(tuple(shape), dtype, device)


def num_bytes(buffer: Buffer) -> int:
    """Returns the bytes of memory that a buffer takes."""
    return int(buffer.num_elements) * int(buffer.element_size)


def concatenate_rows(values: Sequence[Buffer]) -> Buffer:
    """Joins the rows of all values, alike in all other axes, in a new buffer."""
    first = values[0]
    if first.is_host and first.dtype != DType.bfloat16:
        # A third of the time that copies by the driver take.
        return Buffer.from_numpy(np.concatenate([x.to_numpy() for x in values]))
    rows = sum(int(value.shape[0]) for value in values)
    whole = Buffer(
        dtype=first.dtype, shape=(rows, *first.shape[1:]), device=first.device
    )
    start = 0
    for value in values:
        stop = start + int(value.shape[0])
        row_slice(whole, start, stop).inplace_copy_from(value)
        start = stop
    _wait_for_copies(first.device)
    return whole


def split_rows(buffer: Buffer, counts: Sequence[int]) -> list[Buffer]:
    """New buffers of so many rows of axis 0 each."""
    bounds = list(pairwise(accumulate(counts, initial=0)))
    if buffer.is_host and buffer.dtype != DType.bfloat16:
        whole = buffer.to_numpy()
        return [Buffer.from_numpy(whole[start:stop].copy()) for start, stop in bounds]
    return [copied(row_slice(buffer, start, stop)) for start, stop in bounds]


def row_slice(buffer: Buffer, start: int, stop: int) -> Buffer:
    """Returns rows ``start`` to ``stop - 1`` of axis 0 as a view of the buffer."""
    rest = (slice(None),) * (len(buffer.shape) - 1)
    return buffer[(slice(start, stop), *rest)]


def take_rows(buffer: Buffer, rows: Sequence[int]) -> Buffer:
    """Copies the given rows of axis 0 to a new buffer."""
    shape = (len(rows), *buffer.shape[1:])
    taken = Buffer(dtype=buffer.dtype, shape=shape, device=buffer.device)
    for target, source in enumerate(rows):
        _row(taken, target).inplace_copy_from(_row(buffer, source))
    _wait_for_copies(buffer.device)
    return taken


def join_tokens(first: Buffer, second: Buffer) -> Buffer:
    """Joins ``(B, S, C)`` and ``(B, R, C)`` to ``(B, S + R, C)`` in a new buffer."""
    if first.is_host and first.dtype != DType.bfloat16:
        parts = [first.to_numpy(), second.to_numpy()]
        return Buffer.from_numpy(np.concatenate(parts, axis=1))
    batch, channels = int(first.shape[0]), int(first.shape[2])
    lengths = [int(each.shape[1]) for each in (first, second)]
    shape = (batch, sum(lengths), channels)
    whole = Buffer(dtype=first.dtype, shape=shape, device=first.device)
    tokens, place = _tokens(whole), 0
    for sample in range(batch):
        for part, length in zip((first, second), lengths, strict=True):
            own = row_slice(_tokens(part), sample * length, (sample + 1) * length)
            row_slice(tokens, place, place + length).inplace_copy_from(own)
            place += length
    _wait_for_copies(first.device)
    return whole


def first_tokens(buffer: Buffer, count: int) -> Buffer:
    """Copies the first ``count`` tokens of each sample of ``(B, S, C)``."""
    if buffer.is_host and buffer.dtype != DType.bfloat16:
        return Buffer.from_numpy(buffer.to_numpy()[:, :count].copy())
    batch, length, channels = (int(size) for size in buffer.shape)
    shape = (batch, count, channels)
    taken = Buffer(dtype=buffer.dtype, shape=shape, device=buffer.device)
    source, target = _tokens(buffer), _tokens(taken)
    for sample in range(batch):
        own = row_slice(source, sample * length, sample * length + count)
        start = sample * count
        row_slice(target, start, start + count).inplace_copy_from(own)
    _wait_for_copies(buffer.device)
    return taken


def put_rows(target: Buffer, rows: Sequence[int], source: Buffer) -> None:
    """Overwrites the given rows of ``target`` with the rows of ``source``."""
    for index, row in enumerate(rows):
        _row(target, row).inplace_copy_from(_row(source, index))
    _wait_for_copies(target.device)


def copied(buffer: Buffer) -> Buffer:
    """Copies a buffer; the copy is done before any graph that starts after it."""
    if buffer.is_host and buffer.dtype != DType.bfloat16:
        return Buffer.from_numpy(buffer.to_numpy().copy())  # a third of the time
    fresh = buffer.copy()
    _wait_for_copies(buffer.device)
    return fresh


def with_rows(base: Buffer, rows: Sequence[int], source: Buffer) -> Buffer:
    """Copies ``base`` with the given rows replaced by the rows of ``source``."""
    fresh = copied(base)
    put_rows(fresh, rows, source)
    return fresh


def repeat_rows(array: np.ndarray, count: int) -> np.ndarray:
    """Repeats every row ``count`` times in a row, as diffusers repeats prompts."""
    return np.repeat(array, count, axis=0)


def _wait_for_copies(device: Device) -> None:
    """Waits for copies on a CPU, whose graphs do not; a GPU's queue keeps order."""
    if device.is_host:
        device.synchronize()


def _tokens(buffer: Buffer) -> Buffer:
    """The tokens of all samples as rows, ``(B S, C)``: a view."""
    batch, length, channels = (int(size) for size in buffer.shape)
    return buffer.view(buffer.dtype, (batch * length, channels))


def _row(buffer: Buffer, index: int) -> Buffer:
    return row_slice(buffer, index, index + 1)
