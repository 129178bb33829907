"""The Euler step of flow matching: latents move along the predicted velocity."""

from __future__ import annotations

from typing import final

import numpy as np
from max.driver import Buffer, Device

from ..execution.graph_call import SAMPLER, GraphCall, Routine
from .sampler import AbstractSamplerState
from .schedule import Schedule

GRAPH = "euler_step"


@final
class EulerState(AbstractSamplerState):
    """Moves latents by ``x + dt * v``, ``dt`` the change of sigma; keeps no memory.

    Args:
        schedule: Noise levels of the request.
        batch: Number of samples of the request.
        device: Device of the request's latents.
    """

    def __init__(self, schedule: Schedule, batch: int, device: Device) -> None:
        self._schedule, self._batch, self._device = schedule, batch, device

    def step(
        self, latents: Buffer, prediction: Buffer, step: int, stage: int = SAMPLER
    ) -> Routine[Buffer]:
        """Moves the latents along the prediction to the next sigma."""
        return self._move(latents, prediction, self._schedule.dt(step), stage)

    def preview(
        self, latents: Buffer, prediction: Buffer, step: int
    ) -> Routine[Buffer]:
        """Moves the latents along the prediction to sigma 0, in one stride."""
        rest = -float(self._schedule.sigmas[step + 1])
        return self._move(latents, prediction, rest, 0)

    def _move(
        self, latents: Buffer, prediction: Buffer, dt: float, stage: int
    ) -> Routine[Buffer]:
        scale = np.full(self._batch, dt, np.float32)
        inputs = latents, prediction, scale
        outputs = yield GraphCall(GRAPH, inputs, self._device, stage=stage)
        return outputs[0]
