"""Step caches that forecast the prediction by a series, whatever their rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from max.driver import Buffer

from ..execution.graph_call import Routine
from .history import History
from .kinds import AbstractCacheState, AbstractStepCache, Run


@final
@dataclass
class SeriesState(AbstractCacheState):
    """The last computed predictions of one branch."""

    history: History
    due: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Next step to compute, one per sample, int64 ``(B,)``; only of caches that choose
    it ahead."""

    def restart(self, batch: int) -> None:
        """Forgets all predictions, so that the next step computes."""
        self.history.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that all kept predictions take."""
        return self.history.num_bytes

    @property
    def last_compute_step(self) -> int | None:
        """Last computed step of any sample, 0-based; ``None`` before the first."""
        history = self.history
        return None if history.is_empty else int(history.last_steps.max())


class SeriesCache(AbstractStepCache):
    """Base of caches that forecast by a weighted sum of the last predictions.

    Args:
        max_order: Highest order of a forecast.
        coefficients: Coefficients of the forecast, see
            :func:`~max_diffusion.caches.series.series_weights`.
    """

    def __init__(self, max_order: int, coefficients: str) -> None:
        self._max_order, self._coefficients = max_order, coefficients

    def create_state(self, run: Run) -> SeriesState:
        """Creates an empty state; the first computed step fills it."""
        return SeriesState(History(self._max_order, self._coefficients))

    def forecast(self, state: AbstractCacheState, step: int) -> Routine[Buffer]:
        """Forecasts the prediction ``(B, S_img, C)`` at ``step``.

        Raises:
            CacheStateError: Nothing was computed yet.
        """
        return history_of(state).forecast(step)

    def remember(
        self,
        state: AbstractCacheState,
        noise_pred: Buffer,
        step: int,
        rows: Sequence[int] | None = None,
    ) -> Routine[np.ndarray | None]:
        """Keeps the prediction; a new shape starts the history again."""
        history_of(state).push(noise_pred, step, rows)
        yield from ()
        return None


def history_of(state: AbstractCacheState) -> History:
    """Returns the history of a state that a series cache has created."""
    assert isinstance(state, SeriesState)
    return state.history
