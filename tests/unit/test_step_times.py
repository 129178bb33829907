"""When steps are timed, what their times are of, and who waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from max.driver import CPU, Buffer, Device

from max_diffusion.caches import Action, DenoisingCacheState, NoCacheConfig, Run
from max_diffusion.caches.calibration import Calibration
from max_diffusion.caches.kinds import Inputs
from max_diffusion.core.buffers import place_steps, to_numpy
from max_diffusion.core.report import StepRecord
from max_diffusion.denoising.loop import Branch, Denoising
from max_diffusion.execution.batcher import Batcher
from max_diffusion.execution.graph_call import GraphCall, Routine, run
from max_diffusion.sampling import AbstractGuidance, AbstractSamplerState, Schedule

STEPS = 3


@dataclass
class Chip:
    """A device that counts who waits for it."""

    is_host: bool
    waits: int = 0

    def synchronize(self) -> None:
        self.waits += 1


@dataclass
class Graphs(Mapping[str, Any]):
    """Every graph gives its first input back."""

    batches: list[int] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self

    def __iter__(self) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def execute(self, *inputs: Buffer) -> list[Buffer]:
        self.batches.append(int(inputs[0].shape[0]))
        return [inputs[0]]


class Stay(AbstractSamplerState):
    """Leaves the latents as they are."""

    def step(
        self, latents: Buffer, prediction: Buffer, step: int, stage: int = 0
    ) -> Routine[Buffer]:
        yield from ()
        return latents

    def preview(
        self, latents: Buffer, prediction: Buffer, step: int
    ) -> Routine[Buffer]:
        raise NotImplementedError


class First(AbstractGuidance):
    """Takes the conditional prediction."""

    def add_graphs(self, module: Any, dtype: Any, device: Any) -> None:
        raise NotImplementedError

    def combine(
        self, predictions: Sequence[Buffer], scale: float, device: Device, stage: int
    ) -> Routine[Buffer]:
        yield from ()
        return predictions[0]


def take_step(memory: DenoisingCacheState, step: int, inputs: Inputs) -> Routine[Any]:
    memory.actions = (Action.COMPUTE,)
    outputs = yield GraphCall("full", (inputs["latents"],), CPU())
    return outputs[0]


def begin(chip: Chip, *, branches: int, is_timed: bool) -> Denoising:
    cache = NoCacheConfig().create_cache(Calibration())
    states = tuple(
        DenoisingCacheState(cache, cache.create_state(Run())) for _ in range(branches)
    )
    sigmas = np.linspace(1, 0, STEPS + 1, dtype=np.float32)
    return Denoising(
        Buffer.from_numpy(np.ones((1, 2, 3), np.float32)),
        Schedule(sigmas, 1000 * sigmas[:-1]),
        place_steps(1000 * sigmas[:-1], 1, CPU()),
        tuple(Branch(name) for name in ("conditional", "unconditional")[:branches]),
        states,
        None,
        Stay(),
        First(),
        np.ones(STEPS, np.float32),
        take_step,
        cast("Device", chip),
        is_timed=is_timed,
    )


def in_turn(denoising: Denoising, graphs: Graphs) -> None:
    run(graphs, denoising.advance())


def as_one(denoising: Denoising, graphs: Graphs) -> None:
    [lane] = Batcher(graphs, 8).run([denoising.advance()])
    assert lane.error is None


def records(
    advance: Callable[[Denoising, Graphs], None],
    chip: Chip,
    *,
    branches: int = 2,
    is_timed: bool = True,
) -> list[StepRecord]:
    denoising = begin(chip, branches=branches, is_timed=is_timed)
    while not denoising.is_done:
        advance(denoising, Graphs())
    assert len(denoising.records) == STEPS * branches
    return denoising.records


@pytest.mark.parametrize("advance", [in_turn, as_one])
@pytest.mark.parametrize("branches", [1, 2])
def test_a_gpu_that_nobody_times_is_never_waited_for(
    advance: Callable[[Denoising, Graphs], None], branches: int
) -> None:
    chip = Chip(is_host=False)
    found = records(advance, chip, branches=branches, is_timed=False)
    assert chip.waits == 0
    assert {record.milliseconds for record in found} == {None}
    assert not any(record.is_time_shared for record in found)


@pytest.mark.parametrize("advance", [in_turn, as_one])
def test_a_gpu_that_is_timed_is_waited_for_before_and_after_each_branch(
    advance: Callable[[Denoising, Graphs], None],
) -> None:
    chip = Chip(is_host=False)
    found = records(advance, chip)
    assert chip.waits == 2 * 2 * STEPS
    assert all(record.milliseconds is not None for record in found)


def test_a_cpu_is_timed_without_waiting() -> None:
    chip = Chip(is_host=True)
    found = records(in_turn, chip)
    assert chip.waits == 0
    assert all(record.milliseconds is not None for record in found)


def test_branches_in_turn_have_times_of_their_own() -> None:
    found = records(in_turn, Chip(is_host=True))
    assert not any(record.is_time_shared for record in found)


def test_branches_that_run_as_one_have_one_time() -> None:
    found = records(as_one, Chip(is_host=True))
    assert all(record.is_time_shared for record in found)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first.step == second.step
        assert first.milliseconds == second.milliseconds


def test_a_lone_branch_shares_with_nobody() -> None:
    found = records(as_one, Chip(is_host=True), branches=1)
    assert not any(record.is_time_shared for record in found)


@pytest.mark.parametrize(
    ("is_host", "branches", "tokens", "is_one"),
    [
        (True, 2, 512, True),
        (True, 2, 513, False),
        (False, 2, 5000, True),
        (False, 1, 16, False),
        (True, 1, 16, False),
    ],
)
def test_both_branches_run_as_one_where_that_is_faster(
    is_host: bool, branches: int, tokens: int, is_one: bool
) -> None:
    denoising = begin(Chip(is_host), branches=branches, is_timed=False)
    denoising.latents = Buffer.from_numpy(np.zeros((1, tokens, 3), np.float32))
    assert denoising.is_faster_as_one == is_one


@pytest.mark.parametrize(("tokens", "batches"), [(512, [2]), (513, [1, 1])])
def test_a_batcher_runs_both_branches_as_one_where_that_is_faster_only(
    tokens: int, batches: list[int]
) -> None:
    denoising = begin(Chip(is_host=True), branches=2, is_timed=True)
    denoising.latents = Buffer.from_numpy(np.zeros((1, tokens, 3), np.float32))
    graphs = Graphs()
    as_one(denoising, graphs)
    assert graphs.batches == batches
    assert denoising.records[0].is_time_shared == (batches == [2])


def test_every_step_is_told_its_timestep_and_its_record_too() -> None:
    denoising = begin(Chip(is_host=True), branches=1, is_timed=True)
    told: list[list[float]] = []

    def keep(memory: DenoisingCacheState, step: int, inputs: Inputs) -> Routine[Any]:
        timestep = inputs["timestep"]
        assert isinstance(timestep, Buffer)
        told.append(to_numpy(timestep).tolist())
        return take_step(memory, step, inputs)

    denoising.take_step = keep
    while not denoising.is_done:
        in_turn(denoising, Graphs())
    wanted = np.float32(1000) * np.linspace(1, 0, STEPS + 1, dtype=np.float32)
    assert told == [[value] for value in wanted[:-1].tolist()]
    assert [record.timestep for record in denoising.records] == wanted[:-1].tolist()
    sigmas = [record.sigma for record in denoising.records]
    assert sigmas == denoising.schedule.sigmas[:-1].tolist()


def test_what_steps_take_is_a_row_for_each_sample() -> None:
    values = np.array([3, -0.25, np.pi], np.float32)
    placed = place_steps(values, 5, CPU())
    assert [to_numpy(each).tolist() for each in placed] == [
        [value] * 5 for value in values.tolist()
    ]
