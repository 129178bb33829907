"""One request between its noise and its picture, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, final

import numpy as np
from max.driver import Buffer, Device

from ..caches import Action, DenoisingCacheState, GuidanceEstimate
from ..caches.kinds import Inputs
from ..core.report import StepRecord
from ..execution.graph_call import GUIDANCE, SAMPLER, Fork, Routine
from ..sampling import AbstractGuidance, AbstractSamplerState, Schedule

_SKIPPED: Final = frozenset((Action.PREDICT, Action.ESTIMATE))

TakeStep = Callable[[DenoisingCacheState, int, Inputs], Routine[Buffer]]
"""Cache state, step index and inputs to the prediction ``(B, S_img, C)``."""


@final
@dataclass(frozen=True)
class Branch:
    """One guidance branch: its name and the inputs that stay the same all steps."""

    name: str
    inputs: Mapping[str, Buffer] = field(default_factory=dict)


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
    estimate: GuidanceEstimate | None
    """What estimates the unconditional branch at some steps, if anything."""
    sampler: AbstractSamplerState
    """What turns predictions into latents."""
    rule: AbstractGuidance
    """What combines the branches' predictions, where there are two."""
    scales: np.ndarray
    """Guidance scale of every step, float32 ``(num_steps,)``."""
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
            memory.num_bytes for memory in (*self.states, self.estimate) if memory
        )

    def advance(self) -> Routine[None]:
        """Takes one step."""
        assert not self.is_done, "all steps are taken"
        self.is_skipped = True
        timestep = self._per_sample(self.schedule.timesteps[self.step])
        pairs = list(zip(self.branches, self.states, strict=True))
        if self.estimate and self.step in self.estimate.steps:
            first = yield from self._predict(*pairs[0], timestep)
            answers = [first, (yield from self._estimated(*pairs[1], first[0]))]
        else:
            # Whoever runs several at once can run both branches as one.
            answers = yield Fork(
                tuple(self._predict(*pair, timestep) for pair in pairs)
            )
        predictions = [prediction for prediction, _ in answers]
        self.records += [record for _, record in answers]
        prediction = predictions[0]
        if len(predictions) == 2:
            if self.estimate and self.step not in self.estimate.steps:
                self.estimate.remember(*predictions)
            prediction = yield from self.rule.combine(
                predictions,
                float(self.scales[self.step]),
                self.device,
                stage=0 if self.is_skipped else GUIDANCE,
            )
        latents = yield from self.sampler.step(
            self.latents,
            prediction,
            self.step,
            stage=0 if self.is_skipped else SAMPLER,
        )
        self.latents, self.prediction = latents, prediction
        if not self.is_skipped:
            self.cache_bytes = max(self.cache_bytes, self.held_bytes)
        self.step += 1

    def preview(self) -> Routine[Buffer]:
        """Where the last prediction leads in one stride: latents without their noise.

        Float32 ``(B, S_img, C)``; those of the last step are :attr:`latents`.
        """
        assert self.prediction is not None, "no step is taken"
        return self.sampler.preview(self.latents, self.prediction, self.step - 1)

    def _predict(
        self, branch: Branch, state: DenoisingCacheState, timestep: np.ndarray
    ) -> Routine[tuple[Buffer, StepRecord]]:
        """One branch's prediction, and the record of it."""
        started = time.perf_counter()
        own: Inputs = {"latents": self.latents, "timestep": timestep}
        inputs = {**own, **branch.inputs}
        prediction = yield from self.take_step(state, self.step, inputs)
        return prediction, self._record(branch, state, started)

    def _estimated(
        self, branch: Branch, state: DenoisingCacheState, conditional: Buffer
    ) -> Routine[tuple[Buffer, StepRecord]]:
        """The unconditional branch's prediction, from the other one."""
        assert self.estimate is not None
        started = time.perf_counter()
        prediction = yield from self.estimate.estimate(conditional, self.step)
        state.actions = (Action.ESTIMATE,) * self.batch
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
