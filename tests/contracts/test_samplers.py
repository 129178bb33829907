"""What every scheduler must do, checked on every row of one table.

A row is a scheduler configuration as it stands in ``scheduler_config.json``. A new
scheduler adds its rows here and is then held to all properties below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from max_diffusion.errors import ModelLoadError, RequestError
from max_diffusion.sampling import SAMPLERS, AbstractSampler, load_sampler

FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Row:
    """One configuration and the order that its schedule converges with."""

    name: str
    config: dict[str, object]
    order_range: tuple[float, float] = (0.9, 1.1)
    """Bounds of the order measured at 128 to 512 steps."""

    def scheduler(self) -> AbstractSampler:
        return load_sampler(self.config)


def flow_match(
    name: str,
    order_range: tuple[float, float] = (0.9, 1.1),
    **settings: object,
) -> Row:
    return Row(name, {"_class_name": FLOW_MATCH, **settings}, order_range)


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
    schedule = row.scheduler().schedule(None, image_seq_len=333, sigmas=given)
    assert schedule.num_steps == 3
    other = row.scheduler().schedule(3, image_seq_len=333)
    assert not np.array_equal(schedule.sigmas, other.sigmas)


@each_row
def test_schedule_depends_on_its_arguments_only(row: Row) -> None:
    scheduler = row.scheduler()
    first = scheduler.schedule(7, image_seq_len=333)
    scheduler.schedule(4, image_seq_len=1024, sigmas=[0.8, 0.6, 0.3, 0.1])
    again = scheduler.schedule(7, image_seq_len=333)
    np.testing.assert_array_equal(first.sigmas, again.sigmas)
    np.testing.assert_array_equal(first.timesteps, again.timesteps)


@each_row
def test_schedule_refuses_bad_requests_alike(row: Row) -> None:
    scheduler = row.scheduler()
    with pytest.raises(RequestError, match="num_inference_steps must be at least 1"):
        scheduler.schedule(0, image_seq_len=64)
    with pytest.raises(RequestError, match=r"decreasing, got 0\.25 then 0\.75"):
        scheduler.schedule(2, image_seq_len=64, sigmas=[0.25, 0.75])


@each_row
def test_configuration_refuses_unknown_settings(row: Row) -> None:
    with pytest.raises(ModelLoadError, match="unknown settings zzz"):
        load_sampler({**row.config, "zzz": 1})


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


@each_row
def test_euler_on_the_schedule_converges_with_order_one(row: Row) -> None:
    errors = [euler_error(row, num_steps) for num_steps in (128, 256, 512)]
    low, high = row.order_range
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert low < min(orders) <= max(orders) < high, (errors, orders)
    assert errors[-1] < 0.01
