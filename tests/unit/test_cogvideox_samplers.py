"""CogVideoX's samplers against diffusers'.

What their graphs compute is done in numpy here; ``tests/models/test_cogvideox.py`` has
the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from max.driver import CPU, Buffer

from max_diffusion.core.noise import RequestNoise
from max_diffusion.errors import ModelLoadError, RequestError
from max_diffusion.execution.graph_call import GraphCall, Routine
from max_diffusion.sampling import (
    AbstractSamplerState,
    CogVideoXDPMSampler,
    CogVideoXSchedulerConfig,
    load_sampler,
)

SHAPE = (2, 3, 5)
KINDS = {"DDIM": CogVideoXDDIMScheduler, "DPM": CogVideoXDPMScheduler}
CONFIGS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"snr_shift_scale": 1.0},
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "with_signal": {"rescale_betas_zero_snr": False, "snr_shift_scale": 2.0},
    "last_noise": {"set_alpha_to_one": False},
    "few_trained": {"num_train_timesteps": 120, "beta_end": 0.05},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_config = pytest.mark.parametrize("name", CONFIGS)


def settings(name: str) -> dict[str, Any]:
    return {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        **CONFIGS[name],
    }


def opened(kind: str, name: str) -> Any:
    return load_sampler({"_class_name": f"CogVideoX{kind}Scheduler", **settings(name)})


def predictions(count: int) -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(count)
    return [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(count + 1)]


def reference(kind: str, name: str, count: int) -> list[npt.NDArray[np.float32]]:
    """diffusers' latents after every step, with noise of seed 3."""
    scheduler = KINDS[kind](**settings(name))
    scheduler.set_timesteps(count)
    first, *given = predictions(count)
    latents, before = torch.from_numpy(first), None
    generator, found = torch.Generator().manual_seed(3), []
    times = scheduler.timesteps
    for step, (timestep, value) in enumerate(zip(times, given, strict=True)):
        prediction = torch.from_numpy(value)
        if kind == "DDIM":
            moved = scheduler.step(prediction, timestep, latents, return_dict=False)
            latents = moved[0]
        else:
            latents, before = scheduler.step(
                prediction,
                before,
                timestep,
                times[step - 1] if step else None,
                latents,
                generator=generator,
                return_dict=False,
            )
        found.append(latents.numpy().copy())
    return found


def run(routine: Routine[Buffer]) -> Buffer:
    """Runs a step's calls, each as its graph's docstring has it."""
    try:
        call = next(routine)
        while True:
            assert isinstance(call, GraphCall)
            *values, rows = (
                x if isinstance(x, np.ndarray) else x.to_numpy() for x in call.inputs
            )
            assert rows.dtype == np.float32
            row = rows.T[:, :, None, None]
            found = [sum(a * x for a, x in zip(row, values, strict=False))]
            if call.graph == "multistep_step":
                assert len(values) == 4
                found.append(row[4] * values[0] + row[5] * values[1])
            call = routine.send([Buffer.from_numpy(x) for x in found])
    except StopIteration as stop:
        result: Buffer = stop.value
        return result


def started(kind: str, name: str, count: int, seeds: Sequence[int] = (3,)) -> Any:
    sampler = opened(kind, name)
    noise = RequestNoise(seeds, SHAPE[0])
    return sampler.create_state(
        sampler.schedule(count, image_seq_len=3),
        SHAPE[0],
        CPU(),
        lambda: noise.randn(SHAPE[1:]),
    )


def walked(state: AbstractSamplerState, count: int) -> list[npt.NDArray[np.float32]]:
    first, *given = predictions(count)
    latents, found = Buffer.from_numpy(first.copy()), []
    for step, value in enumerate(given):
        prediction = Buffer.from_numpy(value.copy())
        latents = run(state.step(latents, prediction, step))
        found.append(latents.to_numpy().copy())
    return found


@each_kind
@each_config
@pytest.mark.parametrize("count", [1, 3, 28, 50])
def test_every_step_is_diffusers(kind: str, name: str, count: int) -> None:
    found = walked(started(kind, name, count), count)
    for mine, wanted in zip(found, reference(kind, name, count), strict=True):
        assert np.abs(mine - wanted).max() < 1e-5


@each_kind
@each_config
def test_timesteps_are_diffusers(kind: str, name: str) -> None:
    scheduler = KINDS[kind](**settings(name))
    for count in (1, 2, 3, 7, 28, 50, 99, 120):
        scheduler.set_timesteps(count)
        found = opened(kind, name).schedule(count, image_seq_len=3).timesteps
        assert found.tolist() == scheduler.timesteps.tolist()


def test_no_step_is_taken_beyond_the_last_timestep() -> None:
    """diffusers 0.42 takes 62 steps for 61, the last of them at timestep -1."""
    for count in range(1, 1001):
        timesteps = opened("DDIM", "2b").schedule(count, image_seq_len=3).timesteps
        assert timesteps.size == count
        assert timesteps[-1] >= 0


def test_published_levels() -> None:
    """Figures of diffusers' schedulers at the released models' settings."""
    config = CogVideoXSchedulerConfig.from_dict(settings("2b"))
    wanted = [0.9974543276430069, 0.09596956169073541, 6.230788e-08, 0.0]
    assert config.signal()[[0, 499, 998, 999]] == pytest.approx(wanted, rel=1e-6)
    config = CogVideoXSchedulerConfig.from_dict(settings("5b"))
    assert config.signal()[[0, 499]] == pytest.approx([0.99915, 0.24235916655614523])


@each_kind
def test_a_preview_is_what_the_prediction_told(kind: str) -> None:
    count, sampler = 5, opened(kind, "2b")
    state = started(kind, "2b", count)
    before, _ = sampler.levels(sampler.schedule(count, image_seq_len=3).timesteps)
    first, *given = predictions(count)
    latents = Buffer.from_numpy(first.copy())
    for step, value in enumerate(given[:-1]):
        old = latents.to_numpy().copy()
        prediction = Buffer.from_numpy(value.copy())
        latents = run(state.step(latents, prediction, step))
        shown = run(state.preview(latents, prediction, step)).to_numpy()
        wanted = np.sqrt(before[step]) * old - np.sqrt(1 - before[step]) * value
        assert np.abs(shown - wanted).max() < 1e-5


def test_a_sample_with_a_seed_of_its_own_is_the_same_alone() -> None:
    both = walked(started("DPM", "2b", 4, seeds=(8, 9)), 4)
    for row, seed in enumerate((8, 9)):
        sampler = opened("DPM", "2b")
        noise = RequestNoise((seed,), 1)
        state = sampler.create_state(
            sampler.schedule(4, image_seq_len=3),
            1,
            CPU(),
            lambda noise=noise: noise.randn(SHAPE[1:]),
        )
        first, *given = (value[row : row + 1].copy() for value in predictions(4))
        latents = Buffer.from_numpy(first)
        for step, value in enumerate(given):
            prediction = Buffer.from_numpy(value)
            latents = run(state.step(latents, prediction, step))
            assert np.array_equal(latents.to_numpy()[0], both[step][row])


def test_the_noise_of_a_step_is_the_last_drawn() -> None:
    sampler = opened("DPM", "2b")
    assert isinstance(sampler, CogVideoXDPMSampler)
    for count, wanted in ((1, [0]), (3, [0, 1, 0]), (28, [0] + [1] * 27)):
        timesteps = sampler.schedule(count, image_seq_len=3).timesteps
        # 28 steps lead back 35 timesteps each, and the last from 35 to 0.
        assert sampler.is_second_order(timesteps).astype(int).tolist() == wanted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type must be v_prediction, got"),
        ({"beta_schedule": "linear"}, "beta_schedule must be scaled_linear, got"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be null, got"),
        ({"snr_shift_scale": 0.0}, "snr_shift_scale must be finite and above 0, got"),
        ({"timestep_spacing": "evenly"}, "timestep_spacing must be"),
        ({"beta_end": 1.0}, "beta_end must be above 0 and below 1, got 1.0"),
    ],
)
def test_settings_that_cannot_be_sampled_are_named(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        CogVideoXSchedulerConfig.from_dict({**settings("2b"), **changed})


def test_settings_of_other_schedulers_are_passed_over() -> None:
    others = {"shift": 3.0, "clip_sample": True, "solver_order": 2}
    found = CogVideoXSchedulerConfig.from_dict({**settings("2b"), **others})
    assert found == CogVideoXSchedulerConfig.from_dict(settings("2b"))


def test_steps_that_there_are_not_enough_timesteps_for_are_refused() -> None:
    with pytest.raises(RequestError, match="must be at most 1000, the timesteps"):
        opened("DDIM", "2b").schedule(1001, image_seq_len=3)
    far = {**settings("leading"), "steps_offset": 300}
    sampler = load_sampler({"_class_name": "CogVideoXDDIMScheduler", **far})
    with pytest.raises(ModelLoadError, match="the last one trained is 999"):
        sampler.schedule(4, image_seq_len=3)
