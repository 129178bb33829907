"""DDIM steps of CogVideoX: deterministic, without a memory."""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device
from max.dtype import DType
from max.graph import DeviceRef, Module

from graphs.linear_steps import add_linear_step

from ..execution.graph_call import SAMPLER, GraphCall, Routine
from .cogvideox import AbstractCogVideoXSampler
from .sampler import AbstractSamplerState, DrawNoise
from .schedule import Schedule

_GRAPH = "linear_step"


@final
class CogVideoXDDIMSampler(AbstractCogVideoXSampler):
    """Steps ``A x + B x0``, with ``x0`` what the prediction tells.

    ``A = sqrt((1 - a') / (1 - a))``, ``B = sqrt(a') - sqrt(a) A``, ``a`` before and
    ``a'`` after the step: coefficients in float64, sums in float32.

    References:
        Song et al., "Denoising Diffusion Implicit Models", 2020, arXiv:2010.02502.
    """

    def rows(self, timesteps: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Returns ``(num_steps, 4)``: of latents and prediction, for step and preview.

        The preview is linear in the latents after the step, which hold those before.
        """
        before, after = self.levels(timesteps)
        of_noise = np.sqrt((1 - after) / (1 - before))
        of_clean = np.sqrt(after) - np.sqrt(before) * of_noise
        first = of_noise + of_clean * np.sqrt(before)
        second = -of_clean * np.sqrt(1 - before)
        # Where a step leaves no noise, its latents are the preview.
        ends = np.isclose(first, 0)
        back = np.sqrt(before) / np.where(ends, 1, first)
        rest = -np.sqrt(1 - before) - back * second
        columns = first, second, np.where(ends, 1, back), np.where(ends, 0, rest)
        return np.stack(columns, axis=1).astype(np.float32)

    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the graph of a linear step."""
        add_linear_step(module, _GRAPH, dtype, device)

    def create_state(
        self,
        schedule: Schedule,
        batch: int,
        device: Device,
        draw_noise: DrawNoise | None = None,
    ) -> CogVideoXDDIMState:
        """Creates a request's state, which remembers nothing between steps."""
        return CogVideoXDDIMState(self.rows(schedule.timesteps), batch, device)


@final
class CogVideoXDDIMState(AbstractSamplerState):
    """A request's rows of coefficients.

    Args:
        rows: From :meth:`CogVideoXDDIMSampler.rows`.
        batch: Number of samples of the request.
        device: Device of the request's latents.
    """

    def __init__(
        self, rows: npt.NDArray[np.float32], batch: int, device: Device
    ) -> None:
        self._rows, self._batch, self._device = rows, batch, device

    def step(
        self, latents: Buffer, prediction: Buffer, step: int, stage: int = SAMPLER
    ) -> Routine[Buffer]:
        """Moves the latents to the next level of noise."""
        return self._combined(latents, prediction, self._rows[step, :2], stage)

    def preview(
        self, latents: Buffer, prediction: Buffer, step: int
    ) -> Routine[Buffer]:
        """Returns the clean latents that the prediction of the step told."""
        return self._combined(latents, prediction, self._rows[step, 2:], 0)

    def _combined(
        self,
        latents: Buffer,
        prediction: Buffer,
        row: npt.NDArray[np.float32],
        stage: int,
    ) -> Routine[Buffer]:
        rows = np.repeat(row[None], self._batch, axis=0)
        inputs = latents, prediction, rows
        outputs = yield GraphCall(_GRAPH, inputs, self._device, stage=stage)
        return outputs[0]
