"""Weights of forecasts, the step-size controller and the rules of steps: no device."""

from __future__ import annotations

import numpy as np
import pytest

from max_diffusion import CacheStateError, RequestError, StepMaskConfig
from max_diffusion.caches import StepRules, TaylorSeerConfig
from max_diffusion.caches.controller import next_gap
from max_diffusion.caches.series import series_weights


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_newton_is_exact_for_polynomials_over_uneven_gaps(order: int) -> None:
    rng = np.random.default_rng(order)
    for _ in range(50):
        steps = np.cumsum(rng.integers(1, 7, size=order + 1))
        step = int(steps[-1] + rng.integers(1, 6))
        polynomial = rng.standard_normal(order + 1)
        weights = np.array(series_weights(steps.tolist(), step, "newton"))
        wanted = np.polyval(polynomial, step)
        terms = np.abs(np.polyval(np.abs(polynomial), step))
        assert abs(weights @ np.polyval(polynomial, steps) - wanted) <= 1e-9 * terms


@pytest.mark.parametrize("order", [2, 3, 4])
def test_finite_differences_are_not(order: int) -> None:
    steps = np.arange(order + 1)
    weights = np.array(series_weights(steps.tolist(), order + 1))
    assert weights @ steps**2 != (order + 1) ** 2


@pytest.mark.parametrize("coefficients", ["finite_difference", "newton"])
def test_a_known_value_is_given_back(coefficients: str) -> None:
    weights = series_weights([0, 2, 5, 6], 6, coefficients)
    assert np.array_equal(weights, [0, 0, 0, 1])
    assert sum(series_weights([1, 3, 4, 9], 13, coefficients)) == pytest.approx(1)


@pytest.mark.parametrize("steps", [[], [3, 3], [4, 2]])
def test_steps_that_do_not_increase_are_refused(steps: list[int]) -> None:
    with pytest.raises(CacheStateError, match="steps that increase, got"):
        series_weights(steps, 9)


def test_the_next_gap_meets_the_tolerance() -> None:
    """An error of C gap**2, as order 1 has: the gap where it equals the tolerance."""
    gap, scale, tolerance = np.array([3, 3, 3]), np.array([0.002, 0.01, 0.1]), 0.04
    chosen = next_gap(gap, scale * gap**2, tolerance, 1, 20)
    assert list(chosen) == [4, 1, 1]
    assert (scale * chosen**2 <= tolerance).tolist() == [True, True, False]


def test_the_smallest_tolerance_and_error_stay_in_range() -> None:
    error = np.zeros(1, np.float32)
    assert next_gap(np.array([1]), error, 1e-50, 1, 8) == 2
    assert next_gap(np.array([4]), error + 1, 1e-50, 1, 8) == 1


@pytest.mark.parametrize("error", [np.nan, np.inf, 1e30])
def test_a_bad_forecast_computes_the_next_step(error: float) -> None:
    assert next_gap(np.array([8]), np.array([error]), 0.1, 1, 20) == 1


def test_gaps_grow_at_most_twofold_and_to_the_limit() -> None:
    gaps = np.array([1, 2, 4, 7])
    assert list(next_gap(gaps, np.zeros(4), 0.1, 1, 8)) == [2, 4, 8, 8]


def test_lists_and_last_steps_add_up() -> None:
    rules = TaylorSeerConfig(compute_steps=(0, 4), compute_last=2)
    assert rules.required_steps(10) == {0, 4, 8, 9}
    assert TaylorSeerConfig(compute_last=20).required_steps(3) == {0, 1, 2}


@pytest.mark.parametrize(
    ("rules", "num_steps", "message"),
    [
        (
            TaylorSeerConfig(compute_steps=(50,)),
            50,
            "step 50, but the last of 50 is 49",
        ),
        (TaylorSeerConfig(compute_last=1), None, "need the number of steps"),
        (TaylorSeerConfig(compute_steps="fast"), None, "need the number of steps"),
    ],
)
def test_rules_that_cannot_be_met_are_said(
    rules: StepRules, num_steps: int | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        rules.required_steps(num_steps)


def test_a_mask_without_steps_is_refused() -> None:
    with pytest.raises(RequestError, match="must name the steps to compute"):
        StepMaskConfig(compute_steps=())
