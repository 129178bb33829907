"""One request between its noise and its picture, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, final

import numpy as np
from max.driver import Buffer, Device

from .caches import GuidanceEstimate
from .calls import GUIDANCE, SAMPLER, Fork, GraphCall, Routine
from .denoising import ESTIMATE, FORECAST, Branch, DenoisingCacheState, Inputs
from .report import StepRecord
from .schedulers import Schedule

_SKIPPED: Final = frozenset((FORECAST, ESTIMATE))

TakeStep = Callable[[int, DenoisingCacheState, Inputs], Routine[Buffer]]
"""Step index, cache state and inputs to the prediction ``(B, S_img, C)``."""


@final
@dataclass
class Denoising:
    """The denoising loop of one request; whoever holds it says when it steps.

    Made by :meth:`DiffusionPipeline.begin`. Holds everything that belongs to the
    request, so dropping it frees all of it.
    """

    latents: Buffer
    """float32 ``(B, S_img, C)`` after :attr:`step` steps; noise before."""
    schedule: Schedule
    branches: tuple[Branch, ...]
    """The conditional one, and with true guidance the unconditional one."""
    states: tuple[DenoisingCacheState, ...]
    """One a branch."""
    guidance: GuidanceEstimate | None
    """What estimates the unconditional branch at some steps, if anything."""
    true_cfg_scale: float
    take_step: TakeStep
    device: Device
    step: int = 0
    """Steps taken."""
    records: list[StepRecord] = field(default_factory=list)
    cache_bytes: int = 0
    """Most bytes of cache state held at once."""
    prediction: Buffer | None = None
    """Of the last step, ``(B, S_img, C)``."""
    is_skipped: bool = False
    """Whether nothing of the transformer ran in the last step."""

    @property
    def batch(self) -> int:
        """Samples of the request."""
        return int(self.latents.shape[0])

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.schedule.num_steps

    @property
    def held_bytes(self) -> int:
        """Bytes of cache state held now."""
        return sum(
            memory.num_bytes for memory in (*self.states, self.guidance) if memory
        )

    def advance(self) -> Routine[None]:
        """Takes one step."""
        assert not self.is_done, "all steps are taken"
        self.is_skipped = True
        timestep = self._per_sample(self.schedule.timesteps[self.step])
        pairs = list(zip(self.branches, self.states, strict=True))
        if self.guidance and self.step in self.guidance.steps:
            first = yield from self._predict(*pairs[0], timestep)
            answers = [first, (yield from self._estimate(*pairs[1], first[0]))]
        else:
            # Whoever runs several at once can run both branches as one.
            answers = yield Fork(
                tuple(self._predict(*pair, timestep) for pair in pairs)
            )
        predictions = [prediction for prediction, _ in answers]
        self.records += [record for _, record in answers]
        prediction = predictions[0]
        if len(predictions) == 2:
            if self.guidance and self.step not in self.guidance.steps:
                self.guidance.remember(*predictions)
            scale = self._per_sample(self.true_cfg_scale)
            outputs = yield GraphCall(
                "guidance",
                (*predictions, scale),
                self.device,
                stage=0 if self.is_skipped else GUIDANCE,
            )
            prediction = outputs[0]
        dt = self._per_sample(self.schedule.dt(self.step))
        inputs = self.latents, prediction, dt
        outputs = yield GraphCall(
            "euler_step", inputs, self.device, stage=0 if self.is_skipped else SAMPLER
        )
        self.latents, self.prediction = outputs[0], prediction
        if not self.is_skipped:
            self.cache_bytes = max(self.cache_bytes, self.held_bytes)
        self.step += 1

    def preview(self) -> Routine[Buffer]:
        """Where the last prediction leads in one stride: latents without their noise.

        Float32 ``(B, S_img, C)``; those of the last step are :attr:`latents`.
        """
        assert self.prediction is not None, "no step is taken"
        rest = self._per_sample(-float(self.schedule.sigmas[self.step]))
        inputs = self.latents, self.prediction, rest
        outputs = yield GraphCall("euler_step", inputs, self.device)
        return outputs[0]

    def _predict(
        self, branch: Branch, state: DenoisingCacheState, timestep: np.ndarray
    ) -> Routine[tuple[Buffer, StepRecord]]:
        """One branch's prediction, and the record of it."""
        started = time.perf_counter()
        own: Inputs = {"latents": self.latents, "timestep": timestep}
        inputs = {**own, **branch.inputs}
        prediction = yield from self.take_step(self.step, state, inputs)
        return prediction, self._record(branch, state, started)

    def _estimate(
        self, branch: Branch, state: DenoisingCacheState, conditional: Buffer
    ) -> Routine[tuple[Buffer, StepRecord]]:
        """The unconditional branch's prediction, from the other one."""
        assert self.guidance is not None
        started = time.perf_counter()
        prediction = yield from self.guidance.estimate(conditional, self.step)
        state.actions = (ESTIMATE,) * self.batch
        return prediction, self._record(branch, state, started)

    def _record(
        self, branch: Branch, state: DenoisingCacheState, started: float
    ) -> StepRecord:
        """What a branch did in this step."""
        self.is_skipped &= _SKIPPED.issuperset(state.actions)
        if not self.device.is_host:  # whose graphs are done when their calls return
            self.device.synchronize()
        return StepRecord(
            step=self.step,
            branch=branch.name,
            sigma=float(self.schedule.sigmas[self.step]),
            timestep=float(self.schedule.timesteps[self.step]),
            actions=state.actions,
            signal=state.signal,
            milliseconds=(time.perf_counter() - started) * 1e3,
        )

    def _per_sample(self, value: float) -> np.ndarray:
        return np.full(self.batch, value, np.float32)
