"""Caches that forecast the prediction of the steps they do not compute."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from max.driver import Buffer

from ...core.buffers import with_rows
from ...execution.graph_call import Routine
from ..actions import Action
from .base import (
    AbstractCache,
    AbstractCacheState,
    FullTransformer,
    Inputs,
    latents_shape,
)

if TYPE_CHECKING:
    from .state import DenoisingCacheState


class AbstractStepCache(AbstractCache):
    """Base of caches that decide before anything of the step is computed."""

    @abstractmethod
    def decide(
        self, state: AbstractCacheState, step: int, batch: int
    ) -> Sequence[bool]:
        """Returns whether each sample needs the transformer.

        Changes nothing. Without a history all samples need it.
        """

    @abstractmethod
    def forecast(self, state: AbstractCacheState, step: int) -> Routine[Buffer]:
        """Forecasts the prediction ``(B, S_img, C)`` of a step that is not computed."""

    @abstractmethod
    def remember(
        self,
        state: AbstractCacheState,
        noise_pred: Buffer,
        step: int,
        rows: Sequence[int] | None = None,
    ) -> Routine[np.ndarray | None]:
        """Takes in the prediction of a computed step.

        Args:
            state: State of the request's branch; changed in place.
            noise_pred: Prediction ``(B, S_img, C)``, or only ``rows`` of it; kept
                without a copy.
            step: 0-based step index.
            rows: Samples that were computed; ``None`` for all.

        Returns:
            What the next decision rests on, one value per computed sample, or ``None``.
        """

    def run_step(
        self,
        memory: DenoisingCacheState,
        step: int,
        transformer: FullTransformer,
        inputs: Inputs,
    ) -> Routine[Buffer]:
        """Computes the samples that need it, and forecasts the others."""
        batch, _ = latents_shape(inputs)
        decision: Sequence[bool] = [True] * batch
        if memory.changes_to(inputs):
            memory.state.restart(batch)
        elif step not in memory.required_steps:
            decision = self.decide(memory.state, step, batch)
        if any(decision) and not transformer.is_divisible:
            decision = [True] * batch
        memory.actions = tuple(
            [Action.COMPUTE if flag else Action.PREDICT for flag in decision]
        )
        memory.signal = None
        if not any(decision):
            return (yield from self.forecast(memory.state, step))
        rows = None
        if not all(decision):
            rows = [row for row, flag in enumerate(decision) if flag]
            inputs = transformer.rows_of(inputs, rows)
        computed = yield from transformer.full(inputs)
        prediction = computed
        if rows is not None:
            forecast = yield from self.forecast(memory.state, step)
            prediction = with_rows(forecast, rows, computed)
        error = yield from self.remember(memory.state, computed, step, rows)
        if error is not None:
            signal = np.full(batch, np.nan)
            signal[slice(None) if rows is None else rows] = error
            memory.signal = tuple(float(x) for x in signal)
        return prediction
