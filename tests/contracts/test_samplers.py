"""What every scheduler must do, checked on every row of one table.

A row is a scheduler configuration as it stands in ``scheduler_config.json``. A new
scheduler adds its rows here and is then held to all properties below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from max.driver import CPU

from max_diffusion.errors import MaxDiffusionError, ModelLoadError, RequestError
from max_diffusion.sampling import (
    SAMPLERS,
    AbstractSampler,
    CogVideoXDDIMSampler,
    CogVideoXDPMSampler,
    load_sampler,
)

FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Row:
    """One configuration and the order that its schedule converges with."""

    name: str
    config: dict[str, object]
    order_range: tuple[float, float]
    """Bounds of the order measured at the step counts below."""
    error: Callable[[Row, int], float]
    """How far so many steps lead from the exact solution."""
    step_counts: tuple[int, int, int] = (128, 256, 512)
    takes_sigmas: bool = True

    def scheduler(self) -> AbstractSampler:
        return load_sampler(self.config)


def flow_match(
    name: str,
    order_range: tuple[float, float] = (0.9, 1.1),
    **settings: object,
) -> Row:
    config: dict[str, object] = {"_class_name": FLOW_MATCH, **settings}
    return Row(name, config, order_range, euler_error)


def cogvideox(
    name: str,
    kind: str,
    order_range: tuple[float, float],
    **settings: object,
) -> Row:
    config: dict[str, object] = {
        "_class_name": f"CogVideoX{kind}Scheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
        **settings,
    }
    return Row(
        name,
        config,
        order_range,
        ddim_error if kind == "DDIM" else dpm_error,
        # Steps of other counts are of two lengths, and lead past the next timestep.
        step_counts=(125, 250, 500),
        takes_sigmas=False,
    )


class GaussianFlow:
    """The flow from Gaussian data to noise, whose ODE has a closed solution.

    Data ``N(mean, std**2)`` at sigma 0, standard noise at sigma 1, straight paths
    between. In between the marginal is ``N((1 - sigma) mean, variance(sigma))`` and
    a point keeps its number of standard deviations from the mean.
    """

    mean, std = 1.5, 0.4

    def variance(self, sigma: float) -> float:
        return ((1 - sigma) * self.std) ** 2 + sigma**2

    def velocity(self, x: float, sigma: float) -> float:
        growth = (sigma - (1 - sigma) * self.std**2) / self.variance(sigma)
        return -self.mean + growth * (x - (1 - sigma) * self.mean)

    def point(self, deviations: float, sigma: float) -> float:
        return (1 - sigma) * self.mean + deviations * math.sqrt(self.variance(sigma))


def euler_error(row: Row, num_steps: int) -> float:
    """Distance of Euler from the solution at the last sigma above 0.

    Compared there, not at 0: the closing step from a configured terminal sigma is of
    fixed length, so that no number of steps makes it converge.
    """
    schedule = row.scheduler().schedule(num_steps, image_seq_len=1024)
    flow, deviations = GaussianFlow(), 1.3
    sigmas = schedule.sigmas.astype(np.float64)
    x = flow.point(deviations, sigmas[0])
    for step in range(num_steps - 1):
        x += schedule.dt(step) * flow.velocity(x, sigmas[step])
    return abs(x - flow.point(deviations, sigmas[-2]))


def exact_v(a: float) -> tuple[float, float]:
    """The best ``v = slope x + offset`` where data are Gaussian and ``a`` signal."""
    mean, variance = GaussianFlow.mean, GaussianFlow.std**2
    total = a * variance + 1 - a
    slope = math.sqrt(a * (1 - a)) * (1 - variance) / total
    return slope, -math.sqrt(1 - a) * mean - slope * math.sqrt(a) * mean


def ddim_error(row: Row, num_steps: int) -> float:
    """Distance of a point that starts some deviations out from where it should end."""
    sampler = row.scheduler()
    assert isinstance(sampler, CogVideoXDDIMSampler)
    schedule = sampler.schedule(num_steps, image_seq_len=1024)
    before, after = sampler.levels(schedule.timesteps)
    mean, std, deviations = GaussianFlow.mean, GaussianFlow.std, 1.3

    def point(a: float) -> float:
        return math.sqrt(a) * mean + deviations * math.sqrt(a * std**2 + 1 - a)

    x = point(before[0])
    rows = sampler.rows(schedule.timesteps).astype(np.float64)
    for (of_latents, of_prediction, *_), a in zip(rows, before, strict=True):
        slope, offset = exact_v(a)
        x = of_latents * x + of_prediction * (slope * x + offset)
    return abs(x - point(after[-1]))


def dpm_error(row: Row, num_steps: int) -> float:
    """How far mean and deviation of all samples are from the data's.

    Steps are linear, so that the moments of latents and memory together are exact.
    """
    sampler = row.scheduler()
    assert isinstance(sampler, CogVideoXDPMSampler)
    schedule = sampler.schedule(num_steps, image_seq_len=1024)
    before, after = sampler.levels(schedule.timesteps)
    mean, covariance = np.zeros(2), np.diag([1.0, 0.0])
    mean[0] = math.sqrt(before[0]) * GaussianFlow.mean
    covariance[0, 0] = before[0] * GaussianFlow.std**2 + 1 - before[0]
    rows = sampler.rows(schedule.timesteps).astype(np.float64)
    for (k0, k1, k2, k3, j0, j1), a in zip(rows, before, strict=True):
        slope, offset = exact_v(a)
        step = np.array([[k0 + k1 * slope, k2], [j0 + j1 * slope, 0.0]])
        mean = step @ mean + np.array([k1, j1]) * offset
        covariance = step @ covariance @ step.T + np.diag([k3**2, 0.0])
    a = after[-1]
    wanted = math.sqrt(a) * GaussianFlow.mean, a * GaussianFlow.std**2 + 1 - a
    deviation = math.sqrt(covariance[0, 0]) - math.sqrt(wanted[1])
    return math.hypot(mean[0] - wanted[0], deviation)


ROWS = [
    flow_match("plain"),
    flow_match("static_shift", shift=3.0),
    flow_match("weak_shift", shift=0.5),
    flow_match("flux_dev", use_dynamic_shifting=True, shift=3.0),
    flow_match("linear_shift", use_dynamic_shifting=True, time_shift_type="linear"),
    flow_match(
        "qwen_image",
        use_dynamic_shifting=True,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    ),
    flow_match("terminal", shift=3.0, shift_terminal=0.1),
    # Steps of equal ratio down to 1 / n make the error log(n) / n, whose slope from
    # 256 to 512 steps is 1 - log2(9 / 8) = 0.83; Karras' 7th root lies in between.
    flow_match("karras", (0.83, 0.95), use_karras_sigmas=True),
    flow_match("exponential", (0.78, 0.86), use_exponential_sigmas=True),
    flow_match("beta", use_beta_sigmas=True, shift=3.0),
    # Steps near both ends, where the level falls as a root, shrink slower than 1 / n;
    # of second order are all but the first and the last.
    cogvideox("cogvideox_2b", "DDIM", (0.78, 0.9)),
    cogvideox("cogvideox_5b", "DPM", (1.45, 1.65), snr_shift_scale=1.0),
]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def test_every_registered_scheduler_has_a_row() -> None:
    assert {row.config["_class_name"] for row in ROWS} == set(SAMPLERS)


@each_row
@pytest.mark.parametrize("num_steps", [2, 3, 28, 50, 1000])
@pytest.mark.parametrize("image_seq_len", [64, 333, 4096])
def test_schedule_falls_from_noise_to_exactly_zero(
    row: Row, num_steps: int, image_seq_len: int
) -> None:
    schedule = row.scheduler().schedule(num_steps, image_seq_len=image_seq_len)
    assert schedule.num_steps == num_steps
    assert schedule.sigmas.shape == (num_steps + 1,)
    assert schedule.timesteps.shape == (num_steps,)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == np.float32
    assert schedule.sigmas[0] == pytest.approx(1, abs=1e-6)
    assert schedule.sigmas[-1] == 0
    assert (np.diff(schedule.sigmas) < 0).all()
    assert (np.diff(schedule.timesteps) < 0).all()
    steps = [schedule.dt(step) for step in range(num_steps)]
    assert max(steps) < 0
    assert math.fsum(steps) == pytest.approx(-float(schedule.sigmas[0]), abs=1e-5)


@each_row
def test_schedule_keeps_the_number_of_custom_sigmas(row: Row) -> None:
    given = [0.9, 0.5, 0.2]
    if not row.takes_sigmas:
        with pytest.raises(RequestError, match="sigmas have no effect on this model"):
            row.scheduler().schedule(None, image_seq_len=333, sigmas=given)
        return
    schedule = row.scheduler().schedule(None, image_seq_len=333, sigmas=given)
    assert schedule.num_steps == 3
    other = row.scheduler().schedule(3, image_seq_len=333)
    assert not np.array_equal(schedule.sigmas, other.sigmas)


@each_row
def test_schedule_depends_on_its_arguments_only(row: Row) -> None:
    scheduler = row.scheduler()
    first = scheduler.schedule(7, image_seq_len=333)
    sigmas = [0.8, 0.6, 0.3, 0.1] if row.takes_sigmas else None
    scheduler.schedule(4, image_seq_len=1024, sigmas=sigmas)
    again = scheduler.schedule(7, image_seq_len=333)
    np.testing.assert_array_equal(first.sigmas, again.sigmas)
    np.testing.assert_array_equal(first.timesteps, again.timesteps)


@each_row
def test_schedule_refuses_bad_requests_alike(row: Row) -> None:
    scheduler = row.scheduler()
    with pytest.raises(RequestError, match="num_inference_steps must be at least 1"):
        scheduler.schedule(0, image_seq_len=64)
    if row.takes_sigmas:
        with pytest.raises(RequestError, match=r"decreasing, got 0\.25 then 0\.75"):
            scheduler.schedule(2, image_seq_len=64, sigmas=[0.25, 0.75])


@each_row
def test_configuration_refuses_unknown_settings(row: Row) -> None:
    with pytest.raises(ModelLoadError, match="unknown settings zzz"):
        load_sampler({**row.config, "zzz": 1})


@each_row
def test_steps_converge_with_their_order(row: Row) -> None:
    errors = [row.error(row, num_steps) for num_steps in row.step_counts]
    low, high = row.order_range
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert low < min(orders) <= max(orders) < high, (errors, orders)
    assert errors[-1] < 0.02


@each_row
def test_a_sampler_that_needs_noise_says_so(row: Row) -> None:
    scheduler = row.scheduler()
    schedule = scheduler.schedule(2, image_seq_len=64)
    if scheduler.needs_noise:
        with pytest.raises(MaxDiffusionError, match="need fresh noise"):
            scheduler.create_state(schedule, 1, CPU())
    else:
        scheduler.create_state(schedule, 1, CPU())
