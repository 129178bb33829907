"""Extrapolation over steps: how much each known value counts in a forecast.

Every series used here is linear in the values it starts from, so a forecast is one
weighted sum of tensors, whatever the order, and the weights follow from step indices
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from ..core.validation import one_of
from ..errors import CacheStateError

COEFFICIENTS: Final = ("finite_difference", "newton")


def checked_coefficients(where: str, value: str) -> str:
    """Returns ``value`` if it names coefficients, else raises RequestError."""
    return one_of(f"{where}: coefficients", value, COEFFICIENTS)


def series_weights(
    steps: Sequence[int], step: int, coefficients: str = "finite_difference"
) -> list[float]:
    """Returns the weights of the values at ``steps`` in the forecast at ``step``.

    ``finite_difference`` is what all published TaylorSeer code computes: factor ``j``
    is the difference of factor ``j - 1`` over the *last* gap, whatever its order, and
    the forecast is ``sum_j factor_j offset**j / j!``. ``newton`` takes divided
    differences over the real gaps, so that it is exact for polynomials of the order.
    Both are the same at order 0 and 1.

    Args:
        steps: Increasing step indices of the known values, one more than the order.
        step: Step to forecast, in the same unit; also one that is known.
        coefficients: ``finite_difference`` or ``newton``.

    Returns:
        One weight per step, in the steps' order; they add up to 1.

    Raises:
        CacheStateError: ``steps`` is empty or does not increase.

    References:
        Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with
        TaylorSeers", 2025, arXiv:2503.06923, equations 6 to 8.
    """
    # A handful of numbers, once a step: numpy would take longer than the sum itself.
    known = [float(at) for at in steps]
    if not known or any(b <= a for a, b in pairwise(known)):
        raise CacheStateError(
            f"taylorseer: a forecast needs steps that increase, got {list(steps)}"
        )
    count = len(known)
    if count == 2:  # a line, whatever the coefficients; the usual order, so at once
        rate = (step - known[1]) / (known[1] - known[0])
        return [-rate, 1 + rate]
    if coefficients == "newton":
        return _lagrange(known, step)
    ladder: list[list[float]] = []  # of the factors, as weights of the values
    for index in range(count):
        old, ladder = ladder, [[float(index == each) for each in range(count)]]
        for factor in old:
            rate = 1 / (known[index] - known[index - 1])
            pairs = zip(ladder[-1], factor, strict=True)
            ladder.append([(new - before) * rate for new, before in pairs])
    total, power = [0.0] * count, 1.0
    for order, factor in enumerate(ladder):
        total = [t + f * power for t, f in zip(total, factor, strict=True)]
        power *= (step - known[-1]) / (order + 1)
    return total


def exact_degree(order: int, coefficients: str = "finite_difference") -> int:
    """Returns the degree of polynomials that a series forecasts without error.

    Finite differences are exact for lines only, see :func:`series_weights`.
    """
    return order if coefficients == "newton" else min(order, 1)


def _lagrange(known: list[float], step: int) -> list[float]:
    """Returns the weights of Newton's polynomial, with the values as its basis."""
    weights = []
    for index, at in enumerate(known):
        others = [*known[:index], *known[index + 1 :]]
        weights.append(math.prod((step - other) / (at - other) for other in others))
    return weights
