"""The flow matching schedule against diffusers, bit for bit, and its error messages."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import pkgutil
from pathlib import Path
from typing import Any

import diffusers
import diffusers.schedulers
import numpy as np
import numpy.typing as npt
import pytest
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from max_diffusion.errors import ModelLoadError, RequestError
from max_diffusion.sampling import (
    SAMPLERS,
    FlowMatchEulerConfig,
    FlowMatchEulerSampler,
    Schedule,
    load_sampler,
)
from max_diffusion.sampling.foreign import FOREIGN_SETTINGS

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
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings)
    return pipeline_schedule(scheduler, image_seq_len, sigmas)


def pipeline_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler,
    image_seq_len: int,
    sigmas: list[float],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What FluxPipeline does with its scheduler before the first step."""
    config = scheduler.config
    is_flow = hasattr(config, "use_flow_sigmas") and config.use_flow_sigmas
    mu = calculate_shift(
        image_seq_len,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    given = {} if is_flow else {"sigmas": sigmas}
    timesteps, _ = retrieve_timesteps(scheduler, len(sigmas), "cpu", mu=mu, **given)
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
        return  # see test_one_step_is_not_stretched
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
    assert scheduler.mu(256, 4) == pytest.approx(0.5)
    assert scheduler.mu(4096, 4) == pytest.approx(1.15)
    assert scheduler.mu(2176, 4) == pytest.approx(0.825)
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
    ("sigmas", "message"),
    [
        ([1, 1, 0], "strictly decreasing in float32, got 1.0 then 1.0"),
        ([1, math.nan, 0], "must be finite, got nan at step 1"),
    ],
)
def test_schedule_refuses_what_no_loop_can_follow(
    sigmas: list[float], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Schedule(sigmas=float32(sigmas), timesteps=float32([9, 9]))


@pytest.mark.parametrize(
    ("sigmas", "timesteps", "message"),
    [
        ([1, 0.5], [9], "last sigma must be 0, got 0.5"),
        ([1, 0], [math.inf], "timesteps must be finite, got inf"),
        ([1, 0], [9, 9], "n \\+ 1 sigmas"),
        ([0], [], "n >= 1 timesteps"),
    ],
)
def test_what_only_a_scheduler_can_do_wrong_is_the_models_fault(
    sigmas: list[float], timesteps: list[float], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        Schedule(sigmas=float32(sigmas), timesteps=float32(timesteps))
    with pytest.raises(ModelLoadError, match="float32 arrays"):
        Schedule(sigmas=np.array([1.0, 0.0]), timesteps=float32([9]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 1e30}, "for 256 image tokens .*strictly decreasing"),
        ({"num_train_timesteps": 10**39}, "timesteps must be finite, got inf"),
        (
            {"use_dynamic_shifting": True, "base_shift": 1e4, "max_shift": 1e4},
            "for 256 or 4096 image tokens .*must be finite, got nan",
        ),
        (
            {
                "use_dynamic_shifting": True,
                "time_shift_type": "linear",
                "base_shift": -2.0,
                "max_shift": -1.0,
            },
            "for 256 or 4096 image tokens .*linear time shift needs mu above 0",
        ),
        (
            {"use_karras_sigmas": True, "sigma_min": 0.9, "sigma_max": 0.5},
            "strictly decreasing",
        ),
    ],
)
def test_settings_that_give_no_schedule_are_refused_at_load(
    settings: dict[str, Any], message: str
) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **settings}
    with pytest.raises(ModelLoadError, match=message):
        load_sampler(config)


def test_a_linear_shift_below_zero_at_one_size_only_loads() -> None:
    settings = {"base_shift": -1.0, "time_shift_type": "linear"}
    config = {"use_dynamic_shifting": True, **settings}
    scheduler = FlowMatchEulerSampler.from_config(config)
    assert scheduler.schedule(2, image_seq_len=4096).num_steps == 2


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


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("respacing", ["karras", "exponential", "beta", None])
def test_one_step_is_not_stretched(dynamic: bool, respacing: str | None) -> None:
    settings: dict[str, Any] = {"shift_terminal": 0.02, "shift": 3.0}
    settings["use_dynamic_shifting"] = dynamic
    if respacing is not None:
        settings[f"use_{respacing}_sigmas"] = True
    for given in (None, [1.0]):
        schedule = scheduler_of(**settings).schedule(1, image_seq_len=333, sigmas=given)
        assert schedule.sigmas.tolist() == [1, 0]
        assert schedule.timesteps.tolist() == [1000]
    # diffusers divides 0 by 0 there.
    with np.errstate(all="ignore"):
        assert np.isnan(diffusers_schedule(settings, 333, [1.0])[0][0])


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


def all_schedulers() -> list[type[SchedulerMixin]]:
    """Every scheduler of diffusers that can be imported here."""
    found: dict[str, type[SchedulerMixin]] = {}
    for module in pkgutil.walk_packages(
        diffusers.schedulers.__path__, "diffusers.schedulers."
    ):
        try:
            members = vars(importlib.import_module(module.name))
        except ImportError:  # two need torchsde
            continue
        for name, kind in members.items():
            if inspect.isclass(kind) and issubclass(kind, SchedulerMixin):
                found[name] = kind
    return [kind for kind in found.values() if kind is not SchedulerMixin]


def test_settings_of_every_scheduler_of_diffusers_are_known() -> None:
    kinds = all_schedulers()
    assert len(kinds) >= 45
    foreign = {
        name
        for kind in kinds
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    } - {"self"}
    own = {field.name for field in dataclasses.fields(FlowMatchEulerConfig)}
    assert foreign - own == FOREIGN_SETTINGS


SWAPS: list[tuple[str, dict[str, Any]]] = [
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "sigma_min": 0.03}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerDiscreteScheduler", {"sigma_max": 0.9, "use_exponential_sigmas": True}),
    ("EulerDiscreteScheduler", {"sigma_max": 80.0, "sigma_min": 0.002}),
    ("EulerDiscreteScheduler", {"sigma_max": 80.0, "use_beta_sigmas": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchLCMScheduler", {}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("LCMScheduler", {}),
]


@pytest.mark.parametrize(("name", "extra"), SWAPS)
@pytest.mark.parametrize("base", [FLUX_DEV, {"shift": 3.1}], ids=["dev", "static"])
@pytest.mark.parametrize("is_saved", [False, True])
def test_a_scheduler_swapped_and_back_equals_diffusers(
    name: str,
    extra: dict[str, Any],
    base: dict[str, Any],
    is_saved: bool,
    tmp_path: Path,
) -> None:
    """Saved in between, all of the other's settings stay; in memory, those given."""
    original = FlowMatchEulerDiscreteScheduler(**base)
    other = getattr(diffusers, name).from_config(original.config, **extra)
    if is_saved:
        other.save_pretrained(tmp_path / "other")
        back = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "other")
    else:
        back = FlowMatchEulerDiscreteScheduler.from_config(other.config)
    back.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    if is_saved:
        assert written.keys() - dict(original.config).keys()
    ours = load_sampler(written)
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    for num_steps in (1, 4, 28, 101):
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        if num_steps == 1 and np.isnan(pipeline_schedule(theirs, 333, sigmas)[0]).any():
            continue
        expected = pipeline_schedule(theirs, 333, sigmas)
        schedule = ours.schedule(num_steps, image_seq_len=333)
        np.testing.assert_array_equal(schedule.sigmas, expected[0])
        np.testing.assert_array_equal(schedule.timesteps, expected[1])


def test_flow_sigmas_are_between_the_ends_of_training() -> None:
    schedule = scheduler_of(use_flow_sigmas=True).schedule(3, image_seq_len=64)
    np.testing.assert_allclose(schedule.sigmas, [1, 0.5005, 0.001, 0], rtol=1e-6)
    with pytest.raises(RequestError, match="use_flow_sigmas; leave them out"):
        scheduler_of(use_flow_sigmas=True).schedule(
            2, image_seq_len=64, sigmas=[1.0, 0.5]
        )


def test_settings_that_were_never_set_take_their_default() -> None:
    """As in diffusers, whatever stands beside them."""
    written: dict[str, Any] = {"shift": 3.0, "max_shift": 9.0, "base_shift": 0.4}
    written["_use_default_values"] = ["shift", "max_shift"]
    theirs = FlowMatchEulerDiscreteScheduler.from_config(dict(written)).config
    ours = FlowMatchEulerConfig.from_dict(written)
    assert (ours.shift, ours.max_shift, ours.base_shift) == (1.0, 1.15, 0.4)
    assert (theirs.shift, theirs.max_shift, theirs.base_shift) == (1.0, 1.15, 0.4)
    with pytest.raises(ModelLoadError, match="_use_default_values must be a list"):
        FlowMatchEulerConfig.from_dict({"_use_default_values": 3})


def test_config_has_the_defaults_of_diffusers() -> None:
    written = dict(FlowMatchEulerDiscreteScheduler().config)
    settings = {name: v for name, v in written.items() if not name.startswith("_")}
    ours = dataclasses.asdict(FlowMatchEulerConfig())
    foreign = {name: ours.pop(name) for name in ours.keys() - settings.keys()}
    assert ours == settings
    assert foreign == {"use_flow_sigmas": False, "sigma_min": None, "sigma_max": None}


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
        (
            {"time_shift_type": None},
            "time_shift_type must be one of exponential, linear, got None",
        ),
        ({"shift_terminal": 1}, r"in \[0, 1\) or null, got 1.0"),
        ({"shift_terminal": "x"}, "shift_terminal must be a number or null"),
        (
            {"use_beta_sigmas": True, "sigma_min": 0.0},
            "sigma_min must be finite and above 0, or null, got 0.0",
        ),
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
        ({"shift": 3.0}, "must name a _class_name, got none; known are CogVideoX"),
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
