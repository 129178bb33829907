"""The last computed values of every sample, and forecasts from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef, Module

from graphs.caches.series import add_relative_error, add_weighted_sum

from ..core.buffers import num_bytes, take_rows, to_numpy, with_rows
from ..errors import CacheStateError
from ..execution.graph_call import GraphCall, Routine
from .series import series_weights

MAX_ORDER: Final = 4
_EMPTY: Final = -1


def add_series_graphs(
    module: Module, dtype: DType, device: DeviceRef, *, max_order: int = MAX_ORDER
) -> None:
    """Adds the sums of 2 to ``max_order + 1`` terms, and the error of a forecast."""
    for terms in range(2, max_order + 2):
        add_weighted_sum(module, f"weighted_sum_{terms}", dtype, device, terms=terms)
    add_relative_error(module, "relative_error", dtype, device)


def weighted_sum(
    weights: Sequence[Sequence[float]], values: Sequence[Buffer]
) -> Routine[Buffer]:
    """Adds up ``weight * value`` in float32, of two to five values ``(B, S, C)``.

    Args:
        weights: One row per sample with one weight per value; a single row serves all
            samples.
        values: Two to five values of one shape and dtype.
    """
    batch = int(values[0].shape[0])
    rows = np.array(weights, np.float32)
    if len(rows) != batch:
        rows = np.repeat(rows, batch, axis=0)
    name = f"weighted_sum_{len(values)}"
    outputs = yield GraphCall(name, (rows, *values), values[0].device)
    return outputs[0]


def relative_error(forecast: Buffer, actual: Buffer) -> Routine[np.ndarray]:
    """Measures ``mean|forecast - actual| / mean|actual|``, float32 ``(B,)``."""
    outputs = yield GraphCall("relative_error", (forecast, actual), actual.device)
    return to_numpy(outputs[0])


@final
class History:
    """Keeps up to ``max_order + 1`` computed values of each sample of a batch.

    Values are kept as they came, uncopied, in slots of the whole batch; a forecast is
    one weighted sum of slots. Where only some samples computed, their rows replace the
    oldest value of each, so samples advance independently: after any history a
    sample's forecast is the one it would get alone.

    Args:
        max_order: Highest order of a forecast; one slot more is kept.
        coefficients: See :func:`~max_diffusion.caches.series.series_weights`.
    """

    def __init__(self, max_order: int, coefficients: str) -> None:
        self._size = max_order + 1
        self._coefficients = coefficients
        self._slots: list[Buffer] = []
        # Step of each sample's value in each slot, (B, slots).
        self._steps = np.zeros((0, 0), np.int64)

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that all slots take."""
        return len(self._slots) * num_bytes(self._slots[0]) if self._slots else 0

    @property
    def is_empty(self) -> bool:
        """Whether no value was computed yet."""
        return not self._slots

    @property
    def last_steps(self) -> np.ndarray:
        """Last computed step of each sample, int64 ``(B,)``."""
        return np.asarray(self._steps.max(axis=1))

    @property
    def orders(self) -> np.ndarray:
        """Order of each sample's forecast, int64 ``(B,)``."""
        return np.asarray((self._steps != _EMPTY).sum(axis=1) - 1)

    def push(self, value: Buffer, step: int, rows: Sequence[int] | None = None) -> None:
        """Takes in a computed value; one of another shape begins a new history.

        Args:
            value: ``(B, S, C)``; with ``rows`` only theirs, ``(len(rows), S, C)``. A
                value of all samples is kept itself, without a copy.
            step: 0-based step that the value belongs to.
            rows: Samples that were computed; ``None`` for all.

        Raises:
            CacheStateError: ``step`` is not after the last one of a sample.
        """
        if rows is None and not self.continues(value):
            self._slots = [value]
            self._steps = np.full((int(value.shape[0]), 1), step, np.int64)
            return
        chosen = np.arange(len(self._steps)) if rows is None else np.asarray(rows)
        last = int(self.last_steps[chosen].max())
        if step <= last:
            raise CacheStateError(
                f"cache: step {step} was computed after step {last}; steps must "
                "increase"
            )
        is_full = (self._steps[chosen] != _EMPTY).all(axis=1).any()
        if is_full and len(self._slots) < self._size:
            # Replaced below; rows that were not computed stay empty, but finite.
            self._slots.append(self._slots[0])
            self._steps = np.pad(self._steps, ((0, 0), (0, 1)), constant_values=_EMPTY)
        oldest = self._steps.argmin(axis=1)
        if rows is None and (oldest == oldest[0]).all():
            self._slots[oldest[0]] = value
        else:
            for slot in np.unique(oldest[chosen]):
                self._replace(
                    slot, chosen, np.flatnonzero(oldest[chosen] == slot), value
                )
        self._steps[chosen, oldest[chosen]] = step

    def clear(self) -> None:
        """Forgets all values."""
        self._slots = []
        self._steps = np.zeros((0, 0), np.int64)

    def forecast(self, step: int) -> Routine[Buffer]:
        """Returns the value ``(B, S, C)`` of every sample at ``step``.

        With one value so far this is that value's own buffer: do not write to it.

        Raises:
            CacheStateError: Nothing was computed yet.
        """
        if not self._slots:
            raise CacheStateError(
                f"cache: step {step} cannot be predicted before a computed step; "
                "call update first"
            )
        weights = self._weights(step)
        used = [
            slot for slot in range(len(self._slots)) if any(w[slot] for w in weights)
        ]
        if len(used) == 1:
            return self._slots[used[0]]
        values = [self._slots[slot] for slot in used]
        scale = [[row[slot] for slot in used] for row in weights]
        return (yield from weighted_sum(scale, values))

    def relative_error(
        self, value: Buffer, step: int, rows: Sequence[int] | None = None
    ) -> Routine[np.ndarray]:
        """Measures how far a forecast of ``value`` is off, float32 ``(B,)``.

        With ``rows``, ``value`` and the result hold only these samples.
        """
        forecast = yield from self.forecast(step)
        if rows is not None:
            forecast = take_rows(forecast, rows)
        return (yield from relative_error(forecast, value))

    def continues(self, value: Buffer) -> bool:
        """Returns whether ``value`` has the shape of the values before it."""
        return bool(self._slots) and tuple(self._slots[0].shape) == tuple(value.shape)

    def _weights(self, step: int) -> list[list[float]]:
        """Returns each sample's weights of slots; equal histories share the work."""
        histories = [tuple(history) for history in self._steps.tolist()]
        rows = {history: self._row(history, step) for history in set(histories)}
        return [rows[history] for history in histories]

    def _row(self, history: tuple[int, ...], step: int) -> list[float]:
        known = sorted((at, slot) for slot, at in enumerate(history) if at != _EMPTY)
        row = [0.0] * len(history)
        steps = [at for at, _ in known]
        weights = series_weights(steps, step, self._coefficients)
        for (_, slot), weight in zip(known, weights, strict=True):
            row[slot] = weight
        return row

    def _replace(
        self, slot: int, chosen: np.ndarray, places: np.ndarray, value: Buffer
    ) -> None:
        """Puts rows ``places`` of ``value`` where ``chosen`` says, in a new buffer."""
        some = take_rows(value, [int(place) for place in places])
        rows = [int(row) for row in chosen[places]]
        self._slots[slot] = with_rows(self._slots[slot], rows, some)
