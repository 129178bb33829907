"""How many steps lie before the next computed one, by the last forecast's error."""

from __future__ import annotations

from typing import Final

import numpy as np

_SAFETY: Final = 0.9
_MAX_GROWTH: Final = 2.0


def next_gap(
    gap: np.ndarray,
    error: np.ndarray,
    tolerance: float,
    order: int | np.ndarray,
    max_gap: int,
) -> np.ndarray:
    """Returns the gap whose forecasts should err by ``tolerance``, one per sample.

    A series that is exact for polynomials of degree ``p`` errs by ``C gap**(p + 1)``,
    so one measured error tells ``C``. As with the step size of an ODE solver, the new
    gap is a little under what that says and at most twice the old one.

    Args:
        gap: Steps from the last computed one to the one that was forecast and then
            computed, int64 ``(B,)``, 1 or more.
        error: Relative error of that forecast, ``(B,)``; inf or NaN gives 1.
        tolerance: Relative error to aim at, above 0.
        order: Degree ``p`` of the forecast, see
            :func:`~max_diffusion.caches.series.exact_degree`.
        max_gap: Largest gap to return.

    Returns:
        int64 ``(B,)`` in 1..``max_gap``; 1 computes the very next step.

    References:
        Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 2nd
        edition, 1993, section II.4, equation 4.13.
    """
    measured = np.asarray(error, np.float64)
    bounded = np.where(np.isfinite(measured), measured, np.inf)
    with np.errstate(divide="ignore", over="ignore"):
        factor = _SAFETY * (tolerance / bounded) ** (1 / (np.asarray(order) + 1))
    wanted = np.floor(gap * np.minimum(factor, _MAX_GROWTH))
    return np.clip(wanted, 1, max_gap).astype(np.int64)
