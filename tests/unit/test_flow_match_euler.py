"""The flow matching schedule against diffusers, bit for bit, and its error messages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from max_diffusion.errors import ModelLoadError, RequestError
from max_diffusion.sampling import (
    SAMPLERS,
    FlowMatchEulerConfig,
    FlowMatchEulerSampler,
    Schedule,
    load_sampler,
)

FLUX_DEV: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0}
QWEN_IMAGE: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "flux_schnell": {"shift": 1.0},
    "shift_3": {"shift": 3.0},
    "shift_rounding": {"shift": 3.1},
    "shift_below_1": {"shift": 0.7},
    "train_500": {"num_train_timesteps": 500},
    "flux_dev": FLUX_DEV,
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "qwen_image": QWEN_IMAGE,
    "terminal": {"shift": 3.0, "shift_terminal": 0.1},
    "terminal_off": {"shift_terminal": 0.0},
    "karras": {**FLUX_DEV, "use_karras_sigmas": True},
    "exponential": {**FLUX_DEV, "use_exponential_sigmas": True},
    "beta": {**FLUX_DEV, "use_beta_sigmas": True},
}
each_config = pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)


def float32(values: list[float]) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def diffusers_schedule(
    settings: dict[str, Any], image_seq_len: int, sigmas: list[float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Sigmas and timesteps as FluxPipeline of diffusers gets them."""
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    config = scheduler.config
    mu = calculate_shift(
        image_seq_len,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    timesteps, _ = retrieve_timesteps(scheduler, None, "cpu", sigmas=sigmas, mu=mu)
    return scheduler.sigmas.numpy(), timesteps.numpy()


def assert_equals_diffusers(
    schedule: Schedule,
    settings: dict[str, Any],
    image_seq_len: int,
    sigmas: list[float],
) -> None:
    expected_sigmas, expected_timesteps = diffusers_schedule(
        settings, image_seq_len, sigmas
    )
    np.testing.assert_array_equal(schedule.sigmas, expected_sigmas)
    np.testing.assert_array_equal(schedule.timesteps, expected_timesteps)


def scheduler_of(**settings: object) -> FlowMatchEulerSampler:
    return FlowMatchEulerSampler(FlowMatchEulerConfig.from_dict(settings))


@each_config
@pytest.mark.parametrize("num_steps", [1, 2, 4, 28, 50, 1000])
def test_schedule_equals_diffusers(settings: dict[str, Any], num_steps: int) -> None:
    if settings.get("shift_terminal") and num_steps == 1:
        # 0 / 0 in diffusers, which goes on with NaN.
        with pytest.raises(RequestError, match="use at least 2 steps"):
            scheduler_of(**settings).schedule(1, image_seq_len=64)
        return
    for image_seq_len in (64, 255, 256, 333, 1024, 4095, 4096):
        schedule = scheduler_of(**settings).schedule(
            num_steps, image_seq_len=image_seq_len
        )
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        assert_equals_diffusers(schedule, settings, image_seq_len, sigmas)


@each_config
@pytest.mark.parametrize("num_steps", [1, 5, 31])
def test_schedule_equals_diffusers_for_custom_sigmas(
    settings: dict[str, Any], num_steps: int
) -> None:
    sigmas = np.sort(np.random.default_rng(num_steps).uniform(0.01, 0.99, num_steps))
    given = sigmas[::-1].tolist()
    for steps in (None, num_steps):
        schedule = scheduler_of(**settings).schedule(
            steps, image_seq_len=333, sigmas=given
        )
        assert_equals_diffusers(schedule, settings, 333, given)


def test_schedule_is_shifted_by_the_written_formula() -> None:
    schedule = scheduler_of(shift=3.0).schedule(4, image_seq_len=64)
    np.testing.assert_allclose(schedule.sigmas, [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(schedule.timesteps, [1000, 900, 750, 500], rtol=1e-6)
    assert schedule.dt(0) == pytest.approx(-0.1, rel=1e-6)
    assert schedule.dt(3) == -0.5


def test_mu_is_the_line_through_both_lengths() -> None:
    scheduler = scheduler_of(**FLUX_DEV)
    assert scheduler.mu(256) == pytest.approx(0.5)
    assert scheduler.mu(4096) == pytest.approx(1.15)
    assert scheduler.mu(2176) == pytest.approx(0.825)
    halves = [scheduler.schedule(2, image_seq_len=n).sigmas[1] for n in (64, 4096)]
    assert halves[0] < halves[1] == pytest.approx(1 / (1 + math.exp(-1.15)), rel=1e-6)


def test_schedule_is_read_only_and_independent_of_its_source() -> None:
    sigmas, timesteps = float32([1, 0]), float32([1000])
    schedule = Schedule(sigmas=sigmas, timesteps=timesteps)
    sigmas[0] = 0.5
    assert schedule.sigmas[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        schedule.sigmas[0] = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.sigmas = sigmas  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sigmas", "timesteps", "message"),
    [
        ([1, 1, 0], [9, 9], "strictly decreasing in float32, got 1.0 then 1.0"),
        ([1, math.nan, 0], [9, 9], "must be finite, got nan at step 1"),
        ([1, 0.5], [9], "last sigma must be 0, got 0.5"),
        ([1, 0], [math.inf], "timesteps must be finite, got inf"),
        ([1, 0], [9, 9], "n \\+ 1 sigmas"),
        ([0], [], "n >= 1 timesteps"),
    ],
)
def test_schedule_refuses_what_no_loop_can_follow(
    sigmas: list[float], timesteps: list[float], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Schedule(sigmas=float32(sigmas), timesteps=float32(timesteps))
    with pytest.raises(RequestError, match="float32 arrays"):
        Schedule(sigmas=np.array([1.0, 0.0]), timesteps=float32([9]))


@pytest.mark.parametrize("step", [-1, 2])
def test_dt_refuses_steps_outside_the_schedule(step: int) -> None:
    schedule = scheduler_of().schedule(2, image_seq_len=64)
    with pytest.raises(RequestError, match=rf"step must be in 0\.\.1, got {step}"):
        schedule.dt(step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_inference_steps": 0},
            "^sampling: num_inference_steps must be at least 1, got 0$",
        ),
        ({"num_inference_steps": -3}, "must be at least 1, got -3"),
        ({"num_inference_steps": 2.0}, "must be a whole number, got 2.0"),
        ({"num_inference_steps": True}, "must be a whole number, got True"),
        ({"num_inference_steps": None}, "num_inference_steps or sigmas is needed"),
        ({"image_seq_len": 0}, "image_seq_len must be at least 1, got 0"),
        ({"sigmas": [1.0, 0.5]}, "num_inference_steps = 3 values, got 2"),
        ({"sigmas": [1.0, 0.5, 0.5]}, "got 0.5 then 0.5 at positions 1 and 2"),
        ({"sigmas": [1.0, 0.5, 0.0]}, r"in \(0, 1\], got 0.0 at position 2"),
        ({"sigmas": [1.5, 0.5, 0.1]}, r"in \(0, 1\], got 1.5 at position 0"),
        ({"sigmas": [1.0, math.nan, 0.1]}, "got nan at position 1"),
        ({"sigmas": [1.0, 1 - 1e-12, 0.1]}, "got 1.0 then 0.999999999999 at"),
        ({"sigmas": []}, "must be a list of numbers"),
        ({"sigmas": ["1.0", "0.5", "0.1"]}, "must be a list of numbers"),
        ({"sigmas": [[1.0, 0.5], [0.1]]}, "must be a list of numbers"),
    ],
)
def test_schedule_refuses_bad_requests(arguments: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"num_inference_steps": 3, "image_seq_len": 64}
    with pytest.raises(RequestError, match=message):
        scheduler_of().schedule(**{**request, **arguments})


def test_schedule_refuses_one_step_with_a_terminal_shift() -> None:
    with pytest.raises(RequestError, match=r"shift_terminal 0\.02 .* at least 2 steps"):
        scheduler_of(**QWEN_IMAGE).schedule(1, image_seq_len=64)


@pytest.mark.parametrize("image_seq_len", [100_000, 600_000, 10_000_000])
def test_schedule_refuses_shifts_beyond_float32(image_seq_len: int) -> None:
    with pytest.raises(RequestError, match="shifted sigmas must be"):
        scheduler_of(**FLUX_DEV).schedule(8, image_seq_len=image_seq_len)


def test_schedule_refuses_a_linear_shift_below_zero() -> None:
    settings = {"base_shift": -1.0, "time_shift_type": "linear"}
    scheduler = scheduler_of(use_dynamic_shifting=True, **settings)
    with pytest.raises(
        RequestError, match="linear time shift needs mu above 0, got -1"
    ):
        scheduler.schedule(4, image_seq_len=256)


def test_config_reads_what_diffusers_writes() -> None:
    written = dict(FlowMatchEulerDiscreteScheduler(**QWEN_IMAGE).config)
    written |= {"_class_name": "x", "_diffusers_version": "0.42.0"}
    config = FlowMatchEulerConfig.from_dict(written)
    assert config == FlowMatchEulerConfig(
        use_dynamic_shifting=True,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )


def test_config_has_the_defaults_of_diffusers() -> None:
    written = dict(FlowMatchEulerDiscreteScheduler().config)
    settings = {name: v for name, v in written.items() if not name.startswith("_")}
    assert dataclasses.asdict(FlowMatchEulerConfig()) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zeta": 1, "alpha": 2}, "unknown settings alpha, zeta in .* known are base_"),
        ({"invert_sigmas": True}, "invert_sigmas is not supported"),
        ({"stochastic_sampling": True}, "stochastic_sampling is not supported"),
        (
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "only one of .* got use_karras_sigmas and use_beta_sigmas",
        ),
        ({"shift": "3"}, "shift must be a number, got '3'"),
        ({"shift": True}, "shift must be a number, got True"),
        ({"shift": 0}, "shift must be finite and above 0, got 0.0"),
        ({"max_shift": math.nan}, "max_shift must be finite, got nan"),
        ({"use_dynamic_shifting": 1}, "use_dynamic_shifting must be true or false"),
        ({"num_train_timesteps": 1000.5}, "must be a whole number, got 1000.5"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be at least 1, got 0"),
        ({"time_shift_type": "cubic"}, "one of exponential, linear, got 'cubic'"),
        ({"time_shift_type": None}, "time_shift_type must be a string, got None"),
        ({"shift_terminal": 1}, r"in \[0, 1\) or null, got 1.0"),
        ({"shift_terminal": "x"}, "shift_terminal must be a number or null"),
        (
            {"use_dynamic_shifting": True, "max_image_seq_len": 256},
            "max_image_seq_len must be different from base_image_seq_len",
        ),
    ],
)
def test_config_refuses_what_it_cannot_do(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        FlowMatchEulerConfig.from_dict(settings)


def test_load_scheduler_picks_the_class_by_name() -> None:
    scheduler = load_sampler(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3}
    )
    assert isinstance(scheduler, FlowMatchEulerSampler)
    assert scheduler.config == FlowMatchEulerConfig(shift=3.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "DDIMScheduler"},
            "unknown _class_name 'DDIMScheduler' .*Flow",
        ),
        ({"_class_name": 3}, "unknown _class_name 3"),
        ({"shift": 3.0}, "must name a _class_name, got none; known are FlowMatch"),
    ],
)
def test_load_scheduler_refuses_unknown_classes(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_sampler(config)


def test_schedulers_registry_is_read_only() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        SAMPLERS["x"] = FlowMatchEulerSampler  # type: ignore[index]
