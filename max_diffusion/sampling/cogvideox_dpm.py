"""DPM-Solver++ steps of CogVideoX: second order, with fresh noise at every step."""

from __future__ import annotations

from typing import final

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device
from max.dtype import DType
from max.graph import DeviceRef, Module

from graphs.linear_steps import add_multistep_step

from ..core.buffers import to_device
from ..errors import MaxDiffusionError
from ..execution.graph_call import SAMPLER, GraphCall, Routine
from .cogvideox import AbstractCogVideoXSampler
from .sampler import AbstractSamplerState, DrawNoise
from .schedule import Schedule

_GRAPH = "multistep_step"


@final
class CogVideoXDPMSampler(AbstractCogVideoXSampler):
    """Steps ``m1 x - m2 (m3 x0 - m4 x0') + m5 noise``, ``x0'`` of the step before.

    With ``l = log sqrt(a / (1 - a))``, ``h`` its change over this step and ``r`` its
    change over the one before as a part of ``h``: ``m1 = sqrt((1 - a') / (1 - a))
    exp(-h)``, ``m2 = (exp(-2h) - 1) sqrt(a')``, ``m3 = 1 + 1 / 2r``, ``m4 = 1 / 2r``,
    ``m5 = sqrt((1 - a') (1 - exp(-2h)))``; the first step and one that leaves no noise
    have ``m3 = 1, m4 = 0``. Coefficients in float64, sums in float32.

    References:
        Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
        Probabilistic Models", 2022, arXiv:2211.01095 (SDE-DPM-Solver++ 2M).
    """

    needs_noise = True

    def rows(self, timesteps: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Returns ``(num_steps, 6)`` of latents, prediction, memory and noise.

        The last two are of latents and prediction in what is remembered.
        """
        before, after = self.levels(timesteps)
        # Infinite where there is no signal, or no noise; all of it comes out right.
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.log(np.sqrt(before / (1 - before)))
            change = np.log(np.sqrt(after / (1 - after))) - level
            earlier = np.append(0, np.diff(level))
            half = change / (2 * earlier)  # 1 / 2r
        m4 = np.where(self.is_second_order(timesteps), half, 0)
        m3 = 1 + m4
        m1 = np.sqrt((1 - after) / (1 - before)) * np.exp(-change)
        m2 = np.expm1(-2 * change) * np.sqrt(after)
        m5 = np.sqrt((1 - after) * -np.expm1(-2 * change))
        clean = np.sqrt(before), -np.sqrt(1 - before)
        columns = (
            m1 - m2 * m3 * clean[0],
            -m2 * m3 * clean[1],
            m2 * m4,
            m5,
            *clean,
        )
        return np.stack(columns, axis=1).astype(np.float32)

    def is_second_order(
        self, timesteps: npt.NDArray[np.floating]
    ) -> npt.NDArray[np.bool_]:
        """Returns which steps use a memory: all but the first, and one to the end."""
        stride = self.config.num_train_timesteps // timesteps.size
        found = timesteps.astype(np.int64) >= stride
        found[0] = False
        return found

    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the graph of a step with a memory and noise."""
        add_multistep_step(module, _GRAPH, dtype, device)

    def create_state(
        self,
        schedule: Schedule,
        batch: int,
        device: Device,
        draw_noise: DrawNoise | None = None,
    ) -> CogVideoXDPMState:
        """Creates a request's state, which remembers clean latents and draws noise.

        Raises:
            MaxDiffusionError: There is nothing to draw noise with.
        """
        if draw_noise is None:
            raise MaxDiffusionError(
                "CogVideoXDPMScheduler: its steps need fresh noise, and the pipeline "
                "gives none; begin the loop with draw_noise"
            )
        # diffusers draws twice at steps of second order, and uses the second.
        draws = 1 + self.is_second_order(schedule.timesteps)
        rows = self.rows(schedule.timesteps)
        return CogVideoXDPMState(rows, draws, batch, device, draw_noise)


@final
class CogVideoXDPMState(AbstractSamplerState):
    """A request's rows, its noise, and the clean latents of its last step.

    Args:
        rows: From :meth:`CogVideoXDPMSampler.rows`.
        draws: How often each step draws noise; it uses the last.
        batch: Number of samples of the request.
        device: Device of the request's latents.
        draw_noise: What draws it.
    """

    def __init__(
        self,
        rows: npt.NDArray[np.float32],
        draws: npt.NDArray[np.int_],
        batch: int,
        device: Device,
        draw_noise: DrawNoise,
    ) -> None:
        self._rows, self._draws = rows, draws
        self._batch, self._device = batch, device
        self._draw_noise = draw_noise
        self._clean: Buffer | None = None

    def step(
        self, latents: Buffer, prediction: Buffer, step: int, stage: int = SAMPLER
    ) -> Routine[Buffer]:
        """Moves the latents to the next level of noise, with noise of its own."""
        noise = [self._draw_noise() for _ in range(self._draws[step])][-1]
        before = latents if self._clean is None else self._clean
        inputs = (
            latents,
            prediction,
            before,
            to_device(noise, self._device),
            np.repeat(self._rows[step, None], self._batch, axis=0),
        )
        outputs = yield GraphCall(_GRAPH, inputs, self._device, stage=stage)
        moved, self._clean = outputs
        return moved

    def preview(
        self, latents: Buffer, prediction: Buffer, step: int
    ) -> Routine[Buffer]:
        """Returns the clean latents that the step remembered."""
        yield from ()
        return latents if self._clean is None else self._clean
