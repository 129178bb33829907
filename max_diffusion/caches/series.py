"""Extrapolation over steps: how much each known value counts in a forecast.

Every series used here is linear in the values it starts from, so a forecast is one
weighted sum of tensors, whatever the order, and the weights follow from step indices
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ..checks import one_of
from ..errors import CacheStateError

COEFFICIENTS: Final = ("finite_difference", "newton")


def checked_coefficients(where: str, value: str) -> str:
    """``value`` if it names coefficients, else a RequestError."""
    return one_of(f"{where}: coefficients", value, COEFFICIENTS)


def series_weights(
    steps: Sequence[int], step: int, coefficients: str = "finite_difference"
) -> np.ndarray:
    """Weights of the values at ``steps`` in the forecast of the value at ``step``.

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
        float64 ``(len(steps),)``; they add up to 1.

    Raises:
        CacheStateError: ``steps`` is empty or does not increase.

    References:
        Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with
        TaylorSeers", 2025, arXiv:2503.06923, equations 6 to 8.
    """
    known = np.asarray(steps, np.float64)
    if not len(known) or (np.diff(known) <= 0).any():
        raise CacheStateError(
            f"taylorseer: a forecast needs steps that increase, got {list(steps)}"
        )
    if coefficients == "newton":
        return _lagrange(known, step)
    ladder: list[np.ndarray] = []
    for index, value in enumerate(np.eye(len(known))):
        old, ladder = ladder, [value]
        for factor in old:
            ladder.append((ladder[-1] - factor) / (known[index] - known[index - 1]))
    total, power = np.zeros(len(known)), 1.0
    for order, factor in enumerate(ladder):
        total += factor * power
        power *= (step - known[-1]) / (order + 1)
    return total


def _lagrange(known: np.ndarray, step: int) -> np.ndarray:
    """Newton's polynomial, with the values as its basis."""
    weights = np.ones(len(known))
    for index, at in enumerate(known):
        others = np.delete(known, index)
        weights[index] = np.prod((step - others) / (at - others))
    return weights
