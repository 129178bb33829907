"""One request between its noise and its picture, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, final

import numpy as np
from max.driver import Buffer, Device

from ..caches import Action, DenoisingCacheState, GuidanceEstimate
from ..caches.kinds import Inputs
from ..core.report import StepRecord
from ..execution.graph_call import GUIDANCE, SAMPLER, Fork, Routine
from ..sampling import (
    AbstractGuidance,
    AbstractSamplerState,
    KeptPicture,
    Schedule,
)
from .step_inputs import REFERENCE

_SKIPPED: Final = frozenset((Action.PREDICT, Action.ESTIMATE))

# Image tokens of all pictures up to which a CPU runs both branches as one. With the
# demo model, on two cores that others used too, fastest steps compared: 0.79 to 0.93 of
# the time in turn with 64 to 512 tokens; 0.70 to 1.27, too near to tell, with 576 to
# 2048; 1.06 with 4096, for twice the working memory.
_MAX_TOKENS_AS_ONE: Final = 512
_Span = tuple[float, float]
"""When something began and ended, in seconds of ``time.perf_counter()``."""
TakeStep = Callable[[DenoisingCacheState, int, Inputs], Routine[Buffer]]
"""Cache state, step index and inputs to the prediction ``(B, S_img, C)``."""


@final
@dataclass(frozen=True)
class Branch:
    """One guidance branch: its name and the inputs that stay the same all steps."""

    name: str
    inputs: Mapping[str, Buffer] = field(default_factory=dict)


def are_faster_as_one(branches: int, tokens: int, device: Device) -> bool:
    """Returns whether both branches take less time as one batch than in turn.

    Args:
        branches: 2 with true guidance.
        tokens: Image tokens that the transformer reads of all samples of a branch.
        device: What runs it. A GPU reads the weights once for both.
    """
    if branches < 2:
        return False
    return not device.is_host or tokens <= _MAX_TOKENS_AS_ONE


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
    timesteps: Sequence[Buffer]
    """What the model is told at each step, float32 ``(B,)``."""
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
    kept: KeptPicture | None = None
    """What a mask keeps of a known picture."""
    is_timed: bool = True
    """Whether records have milliseconds, for which a GPU is waited for."""
    step: int = 0
    """Steps taken."""
    records: list[StepRecord] = field(default_factory=list)
    held_bytes: int = 0
    """Bytes of cache state held now."""
    cache_bytes: int = 0
    """Most bytes of cache state held at once."""
    prediction: Buffer | None = None
    """Of the last step, ``(B, S_img, C)``."""
    is_skipped: bool = False
    """Whether nothing of the transformer ran in the last step."""

    @cached_property
    def batch(self) -> int:
        """Samples of the request."""
        return int(self.latents.shape[0])

    @cached_property
    def image_tokens(self) -> int:
        """Image tokens of one sample."""
        return int(self.latents.shape[1])

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.schedule.num_steps

    @cached_property
    def is_faster_as_one(self) -> bool:
        """Whether both branches take less time as one batch than in turn."""
        reference = self.branches[0].inputs.get(REFERENCE)
        tokens = self.image_tokens
        tokens += 0 if reference is None else int(reference.shape[1])
        return are_faster_as_one(len(self.branches), self.batch * tokens, self.device)

    def advance(self) -> Routine[None]:
        """Takes one step."""
        assert not self.is_done, "all steps are taken"
        timestep = self.timesteps[self.step]
        pairs = list(zip(self.branches, self.states, strict=True))
        if len(pairs) == 1:
            answers = [(yield from self._predict(*pairs[0], timestep))]
        elif self.estimate and self.step in self.estimate.steps:
            first = yield from self._predict(*pairs[0], timestep)
            estimated = yield from self._estimated(self.states[1], first[0])
            answers = [first, estimated]
        elif self.is_faster_as_one:
            # Whoever runs several at once runs both branches as one.
            answers = yield Fork(
                tuple(self._predict(*pair, timestep) for pair in pairs)
            )
        else:
            answers = []
            for pair in pairs:
                answers.append((yield from self._predict(*pair, timestep)))
        predictions = [prediction for prediction, _ in answers]
        self._note([span for _, span in answers])
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
        if self.kept is not None:
            latents = yield from self.kept.restore(
                latents,
                float(self.schedule.sigmas[self.step + 1]),
                stage=0 if self.is_skipped else SAMPLER,
            )
        self.latents, self.prediction = latents, prediction
        if not self.is_skipped:
            self.held_bytes = sum(
                memory.num_bytes for memory in (*self.states, self.estimate) if memory
            )
            self.cache_bytes = max(self.cache_bytes, self.held_bytes)
        self.step += 1

    def preview(self) -> Routine[Buffer]:
        """Where the last prediction leads in one stride: latents without their noise.

        Float32 ``(B, S_img, C)``; those of the last step are :attr:`latents`.
        """
        assert self.prediction is not None, "no step is taken"
        return self.sampler.preview(self.latents, self.prediction, self.step - 1)

    def _predict(
        self, branch: Branch, state: DenoisingCacheState, timestep: Buffer
    ) -> Routine[tuple[Buffer, _Span]]:
        """One branch's prediction, and when it ran."""
        started = self._now()
        own: Inputs = {"latents": self.latents, "timestep": timestep}
        inputs = {**own, **branch.inputs}
        prediction = yield from self.take_step(state, self.step, inputs)
        return prediction, (started, self._now())

    def _estimated(
        self, state: DenoisingCacheState, conditional: Buffer
    ) -> Routine[tuple[Buffer, _Span]]:
        """The unconditional branch's prediction, from the other one."""
        assert self.estimate is not None
        started = self._now()
        prediction = yield from self.estimate.estimate(conditional, self.step)
        state.actions = (Action.ESTIMATE,) * self.batch
        return prediction, (started, self._now())

    def _now(self) -> float:
        """Seconds; if steps are timed, when all that the device was asked for is done.

        A GPU that is waited for stands idle until it is told more. On a CPU graphs are
        done when their calls return.
        """
        if self._waits:
            self.device.synchronize()
        return time.perf_counter()

    @cached_property
    def _waits(self) -> bool:
        """Whether a device has to be waited for where a time is taken."""
        return self.is_timed and not self.device.is_host

    def _note(self, spans: Sequence[_Span]) -> None:
        """Keeps what each branch did in this step, and how long that took."""
        self.is_skipped = all(
            _SKIPPED.issuperset(state.actions) for state in self.states
        )
        # In turn, one begins when the other has ended.
        is_shared = len(spans) == 2 and spans[1][0] < spans[0][1]
        if is_shared:
            started, ended = zip(*spans, strict=True)
            spans = [(min(started), max(ended))] * 2
        sigma, timestep = self.schedule.levels[self.step]
        for branch, state, (start, end) in zip(
            self.branches, self.states, spans, strict=True
        ):
            self.records.append(
                StepRecord(
                    step=self.step,
                    branch=branch.name,
                    sigma=sigma,
                    timestep=timestep,
                    actions=state.actions,
                    signal=state.signal,
                    milliseconds=(end - start) * 1e3 if self.is_timed else None,
                    is_time_shared=is_shared and self.is_timed,
                )
            )
