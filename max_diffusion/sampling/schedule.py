"""The noise levels that a request steps through.

Three words are kept apart: *sigma* (share of noise, 1 to 0), *timestep* (what the model
receives) and *step* (0-based index).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex, final

import numpy as np
import numpy.typing as npt

from ..errors import ModelLoadError, RequestError


@final
@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels that one request steps through.

    Both arrays are copied and made read-only, so a schedule can be shared.

    Raises:
        ModelLoadError: The arrays are not float32 of fitting lengths, the sigmas do not
            end at 0 or the timesteps are not finite: the scheduler's own fault.
        RequestError: The sigmas are not finite or not strictly decreasing, which too
            many steps or too large an image brings about.
    """

    sigmas: npt.NDArray[np.float32]
    """Noise levels, float32 ``(num_steps + 1,)``: strictly decreasing, the last is
    exactly 0."""

    timesteps: npt.NDArray[np.float32]
    """What the model is told at each step, float32 ``(num_steps,)``, in units of the
    training schedule (0 to 1000 for FLUX)."""

    skipped_steps: int = 0
    """Number of steps of the whole schedule before these, where a picture to start from
    takes their place."""

    def __post_init__(self) -> None:
        """Takes copies of the arrays and checks what every loop relies on."""
        sigmas, timesteps = self.sigmas.copy(), self.timesteps.copy()
        if (
            sigmas.dtype != np.float32
            or timesteps.dtype != np.float32
            or timesteps.ndim != 1
            or timesteps.size == 0
            or sigmas.shape != (timesteps.size + 1,)
        ):
            raise ModelLoadError(
                "scheduler: a schedule needs float32 arrays of n + 1 sigmas and n >= 1 "
                f"timesteps, got {sigmas.dtype}{list(sigmas.shape)} and "
                f"{timesteps.dtype}{list(timesteps.shape)}; fix the scheduler."
            )
        _check_falls_to_zero(sigmas)
        if not np.isfinite(timesteps).all():
            raise ModelLoadError(
                "scheduler: timesteps must be finite, got "
                f"{timesteps[~np.isfinite(timesteps)][0]}; correct "
                "scheduler_config.json."
            )
        sigmas.flags.writeable = False
        timesteps.flags.writeable = False
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "timesteps", timesteps)

    @cached_property
    def levels(self) -> tuple[tuple[float, float], ...]:
        """Sigma and timestep that each step starts from."""
        pairs = zip(self.sigmas[:-1].tolist(), self.timesteps.tolist(), strict=True)
        return tuple(pairs)

    @cached_property
    def num_steps(self) -> int:
        """Number of denoising steps, at least 1."""
        return self.timesteps.size

    def after(self, steps: int) -> Schedule:
        """Returns what is left of the schedule after some steps.

        Args:
            steps: Steps that are left out, 0 to ``num_steps - 1``.
        """
        skipped = self.skipped_steps + steps
        return Schedule(self.sigmas[steps:], self.timesteps[steps:], skipped)

    def dt(self, step: int) -> float:
        """Returns the change of sigma over one step, below 0.

        The difference is rounded to float32, as the compiled update receives it.

        Args:
            step: Step index, 0 to ``num_steps - 1``.

        Returns:
            ``sigmas[step + 1] - sigmas[step]``.

        Raises:
            RequestError: There is no such step.
        """
        if not 0 <= step < self.num_steps:
            raise RequestError(
                f"sampling: step must be in 0..{self.num_steps - 1}, got {step}; "
                "count steps from 0."
            )
        return float(self.sigmas[step + 1] - self.sigmas[step])


def resolve_sigmas(
    num_inference_steps: int | None,
    sigmas: Sequence[float] | npt.NDArray[np.floating] | None,
) -> npt.NDArray[np.float32]:
    """Checks the caller's steps and sigmas, and fills in the usual spacing.

    Args:
        num_inference_steps: Number of steps, or None to count ``sigmas``.
        sigmas: Noise levels before any shift, or None for ``num_inference_steps``
            evenly spaced ones from 1 down to ``1 / num_inference_steps``.

    Returns:
        Shape ``(num_steps,)``, float32, strictly decreasing, in (0, 1].

    Raises:
        RequestError: See ``AbstractSampler.schedule``.
    """
    num_steps = None
    if num_inference_steps is not None:
        num_steps = checked_count("num_inference_steps", num_inference_steps)
    if sigmas is not None:
        return _checked_sigmas(sigmas, num_steps)
    if num_steps is None:
        raise RequestError(
            "sampling: num_inference_steps or sigmas is needed, got neither; pass for "
            "example num_inference_steps=28."
        )
    return np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)


def checked_count(name: str, value: SupportsIndex) -> int:
    """Returns ``value`` as an int of at least 1.

    Raises:
        RequestError: It is no whole number, or below 1.
    """
    try:
        count = operator.index(value)
    except TypeError as err:
        raise RequestError(
            f"sampling: {name} must be a whole number, got {value!r}; pass an int."
        ) from err
    if isinstance(value, bool):
        raise RequestError(
            f"sampling: {name} must be a whole number, got {value!r}; pass an int."
        )
    if count < 1:
        raise RequestError(f"sampling: {name} must be at least 1, got {count}")
    return count


def _checked_sigmas(
    sigmas: Sequence[float] | npt.NDArray[np.floating], num_steps: int | None
) -> npt.NDArray[np.float32]:
    try:
        given = np.asarray(sigmas)
    except ValueError as err:
        raise RequestError(
            f"sampling: sigmas must be a list of numbers, got {sigmas!r}; pass for "
            "example [1.0, 0.75, 0.5, 0.25]."
        ) from err
    if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "fiu":
        raise RequestError(
            f"sampling: sigmas must be a list of numbers, got {sigmas!r}; pass for "
            "example [1.0, 0.75, 0.5, 0.25]."
        )
    # Checked as float32, which is what the steps are made of: two values that
    # differ only in float64 would give a step of length 0.
    values = given.astype(np.float32)
    outside = ~((values > 0) & (values <= 1))  # true for NaN as well
    if outside.any():
        index = int(outside.argmax())
        raise RequestError(
            "sampling: sigmas must be finite and in (0, 1], got "
            f"{float(given[index])} at position {index}; the final 0 is added for you."
        )
    rises = np.diff(values) >= 0
    if rises.any():
        index = int(rises.argmax())
        raise RequestError(
            "sampling: sigmas must be strictly decreasing, got "
            f"{float(given[index])} then {float(given[index + 1])} at positions "
            f"{index} and {index + 1}; list them from noise (1) to picture (0)."
        )
    if num_steps is not None and num_steps != values.size:
        raise RequestError(
            f"sampling: sigmas must hold num_inference_steps = {num_steps} values, "
            f"got {values.size}; leave one of the two out."
        )
    return values


def _check_falls_to_zero(sigmas: npt.NDArray[np.float32]) -> None:
    finite = np.isfinite(sigmas)
    if not finite.all():
        raise RequestError(
            "sampling: shifted sigmas must be finite, got "
            f"{float(sigmas[~finite][0])} at step {int((~finite).argmax())}; check the "
            "scheduler's shift settings against this picture size."
        )
    rises = np.diff(sigmas) >= 0
    if rises.any():
        step = int(rises.argmax())
        raise RequestError(
            "sampling: shifted sigmas must be strictly decreasing in float32, got "
            f"{float(sigmas[step])} then {float(sigmas[step + 1])} after step {step}; "
            "use fewer steps or a weaker shift."
        )
    if sigmas[-1] != 0:
        raise ModelLoadError(
            f"scheduler: the last sigma must be 0, got {float(sigmas[-1])}; fix the "
            "scheduler."
        )
