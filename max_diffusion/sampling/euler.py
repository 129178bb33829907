"""The Euler step of flow matching: latents move along the predicted velocity."""

from __future__ import annotations

from typing import final

from max.driver import Buffer, Device

from ..core.buffers import place_steps
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
        self._sigmas, self._batch, self._device = schedule.sigmas, batch, device
        changes = [schedule.dt(step) for step in range(schedule.num_steps)]
        self._changes = place_steps(changes, batch, device)

    def step(
        self, latents: Buffer, prediction: Buffer, step: int, stage: int = SAMPLER
    ) -> Routine[Buffer]:
        """Moves the latents along the prediction to the next sigma."""
        return self._move(latents, prediction, self._changes[step], stage)

    def preview(
        self, latents: Buffer, prediction: Buffer, step: int
    ) -> Routine[Buffer]:
        """Moves the latents along the prediction to sigma 0, in one stride."""
        rest = -float(self._sigmas[step + 1])
        [change] = place_steps([rest], self._batch, self._device)
        return self._move(latents, prediction, change, 0)

    def _move(
        self, latents: Buffer, prediction: Buffer, change: Buffer, stage: int
    ) -> Routine[Buffer]:
        inputs = latents, prediction, change
        outputs = yield GraphCall(GRAPH, inputs, self._device, stage=stage)
        return outputs[0]
