"""The Euler schedule of flow matching, used by FLUX, Qwen-Image, SD3 and others.

Bit for bit the sigmas and timesteps of diffusers' ``FlowMatchEulerDiscreteScheduler``
as ``FluxPipeline`` drives it. The update is that of ``euler``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal, Self, final

import numpy as np
import numpy.typing as npt
from max.driver import Device
from max.dtype import DType
from max.graph import DeviceRef, Module

from graphs.sampler import add_euler_step

from ..errors import ModelLoadError, RequestError
from .euler import GRAPH, EulerState
from .sampler import AbstractSampler
from .schedule import Schedule, checked_count, resolve_sigmas

_KARRAS_RHO: Final = 7.0
_BETA_SHAPE: Final = 0.6
_ONE: Final = np.float32(1)
_TIME_SHIFT_TYPES: Final = ("exponential", "linear")


@final
@dataclass(frozen=True)
class FlowMatchEulerConfig:
    """Settings of the schedule, under the names diffusers gives them.

    Raises:
        ModelLoadError: A value is out of range, two settings contradict each other,
            or ``invert_sigmas`` or ``stochastic_sampling`` is asked for.
    """

    num_train_timesteps: int = 1000
    """Timestep of sigma 1, at least 1."""

    shift: float = 1.0
    """Static shift, above 0; 1 leaves sigmas alone. Unused with dynamic shifting."""

    use_dynamic_shifting: bool = False
    """Shift by ``mu``, which grows with the picture, in place of ``shift``."""

    base_shift: float = 0.5
    """``mu`` at ``base_image_seq_len`` tokens."""

    max_shift: float = 1.15
    """``mu`` at ``max_image_seq_len`` tokens; beyond, the line goes on."""

    base_image_seq_len: int = 256
    """Image tokens where ``mu`` is ``base_shift``."""

    max_image_seq_len: int = 4096
    """Image tokens where ``mu`` is ``max_shift``."""

    invert_sigmas: bool = False
    """Only False: a rising schedule (Mochi) is not supported."""

    shift_terminal: float | None = None
    """Stretch the schedule so that its last sigma is this, in [0, 1); the step from
    there to 0 follows. None and 0 leave it alone."""

    use_karras_sigmas: bool = False
    """Respace evenly in the 7th root of sigma."""

    use_exponential_sigmas: bool = False
    """Respace evenly in the logarithm of sigma."""

    use_beta_sigmas: bool = False
    """Respace by the quantiles of a Beta(0.6, 0.6) distribution."""

    time_shift_type: Literal["exponential", "linear"] = "exponential"
    """Whether the dynamic shift multiplies odds by ``exp(mu)`` or by ``mu``."""

    stochastic_sampling: bool = False
    """Only False: fresh noise at every step is not supported."""

    def __post_init__(self) -> None:
        """Refuses what cannot be sampled, before a model is loaded."""
        for name, asked in (
            ("invert_sigmas", self.invert_sigmas),
            ("stochastic_sampling", self.stochastic_sampling),
        ):
            if asked:
                raise ModelLoadError(
                    f"scheduler: {name} is not supported, got true; set it to false "
                    "or use a model trained without it."
                )
        respacings = {
            "use_karras_sigmas": self.use_karras_sigmas,
            "use_exponential_sigmas": self.use_exponential_sigmas,
            "use_beta_sigmas": self.use_beta_sigmas,
        }
        if sum(respacings.values()) > 1:
            chosen = " and ".join(name for name, asked in respacings.items() if asked)
            raise ModelLoadError(
                f"scheduler: only one of {', '.join(respacings)} may be true, got "
                f"{chosen}; keep one."
            )
        self._check_ranges()

    def _check_ranges(self) -> None:
        steps = self.num_train_timesteps
        _require(steps >= 1, "num_train_timesteps", "at least 1", steps)
        shift = self.shift
        is_ratio = math.isfinite(shift) and shift > 0
        _require(is_ratio, "shift", "finite and above 0", shift)
        for name, mu in (
            ("base_shift", self.base_shift),
            ("max_shift", self.max_shift),
        ):
            _require(math.isfinite(mu), name, "finite", mu)
        _require(
            not self.use_dynamic_shifting
            or self.base_image_seq_len != self.max_image_seq_len,
            "max_image_seq_len",
            "different from base_image_seq_len for dynamic shifting",
            self.max_image_seq_len,
        )
        end = self.shift_terminal
        _require(
            end is None or 0 <= end < 1, "shift_terminal", "in [0, 1) or null", end
        )
        kind = self.time_shift_type
        expected = f"one of {', '.join(_TIME_SHIFT_TYPES)}"
        _require(kind in _TIME_SHIFT_TYPES, "time_shift_type", expected, kind)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, object]) -> Self:
        """Reads the contents of a diffusers ``scheduler_config.json``.

        Args:
            mapping: Settings by name; missing ones take their default. Names that
                begin with an underscore (``_class_name``) are passed over.

        Raises:
            ModelLoadError: A name is unknown, a value has the wrong type or breaks a
                rule of this class.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        settings = {
            name: value for name, value in mapping.items() if not name.startswith("_")
        }
        unknown = sorted(settings.keys() - defaults.keys())
        if unknown:
            raise ModelLoadError(
                f"scheduler: unknown settings {', '.join(unknown)} in "
                "scheduler_config.json; known are " + ", ".join(sorted(defaults)) + "."
            )
        typed = {
            name: _typed(name, value, defaults[name])
            for name, value in settings.items()
        }
        return cls(**typed)  # type: ignore[arg-type]  # _typed checked each of them


@final
class FlowMatchEulerSampler(AbstractSampler):
    r"""Flow matching schedule with static or resolution dependent shift.

    Maths, in float32, in this order: evenly spaced sigmas from 1 to ``1 / n`` or the
    caller's; shift, which multiplies the odds of noise,
    ``odds(sigma) = sigma / (1 - sigma)``, by a factor; stretch to
    ``shift_terminal``; respacing; timesteps ``= sigma * num_train_timesteps``; 0
    appended. The factor is ``shift``, or with dynamic shifting ``exp(mu)`` (``mu``
    for ``time_shift_type="linear"``), where ``mu`` lies on the line through
    (``base_image_seq_len``, ``base_shift``) and (``max_image_seq_len``,
    ``max_shift``).

    References:
        Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
        Synthesis", 2024, arXiv:2403.03206 (the shift). Karras et al., "Elucidating
        the Design Space of Diffusion-Based Generative Models", 2022,
        arXiv:2206.00364. Lee et al., "Beta Sampling is All You Need", 2024,
        arXiv:2407.12173.
        Differs from diffusers 0.42: what gives NaN or a step of length 0 there is an
        error here, and ``num_inference_steps`` has to agree with ``sigmas``.
    """

    def __init__(self, config: FlowMatchEulerConfig) -> None:
        """Keeps the configuration; everything else happens in ``schedule``.

        Args:
            config: The settings.
        """
        self.config: Final = config

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Builds the scheduler from the contents of a ``scheduler_config.json``.

        Args:
            config: See ``FlowMatchEulerConfig.from_dict``.

        Raises:
            ModelLoadError: See ``FlowMatchEulerConfig.from_dict``.
        """
        return cls(FlowMatchEulerConfig.from_dict(config))

    def schedule(
        self,
        num_inference_steps: int | None,
        *,
        image_seq_len: int,
        sigmas: Sequence[float] | npt.NDArray[np.floating] | None = None,
    ) -> Schedule:
        """Computes the sigmas and timesteps of one request.

        Args:
            num_inference_steps: Number of denoising steps, at least 1. May be None
                when ``sigmas`` is given.
            image_seq_len: Image tokens of one sample, at least 1; matters only with
                dynamic shifting.
            sigmas: The caller's own noise levels before the shift, one per step,
                strictly decreasing, in (0, 1], without the final 0.

        Returns:
            Sigmas from at most 1 (up to rounding) to 0, and their timesteps.

        Raises:
            RequestError: An argument breaks a rule above, ``shift_terminal`` has a
                single sigma of 1 to stretch, or the shifted sigmas do not decrease.
        """
        spaced = resolve_sigmas(num_inference_steps, sigmas)
        seq_len = checked_count("image_seq_len", image_seq_len)
        # An extreme shift overflows here and is refused by Schedule, with numbers.
        with np.errstate(all="ignore"):
            spaced = self._respaced(self._stretched(self._shifted(spaced, seq_len)))
            return Schedule(
                sigmas=np.append(spaced, np.float32(0)),
                timesteps=spaced * np.float32(self.config.num_train_timesteps),
            )

    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the Euler step."""
        add_euler_step(module, GRAPH, dtype, device)

    def create_state(
        self, schedule: Schedule, batch: int, device: Device
    ) -> EulerState:
        """Of one request; remembers nothing between steps."""
        return EulerState(schedule, batch, device)

    def mu(self, image_seq_len: int) -> float:
        """Returns the shift exponent for a picture of ``image_seq_len`` tokens.

        Used only with dynamic shifting. Linear in the length, also outside the two
        lengths that define the line.
        """
        config = self.config
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        # Not `base_shift + slope * (len - base)`: that rounds differently from the
        # reference, and the last bit of mu is visible in the sigmas.
        return image_seq_len * slope + (
            config.base_shift - slope * config.base_image_seq_len
        )

    def _shifted(
        self, sigmas: npt.NDArray[np.float32], image_seq_len: int
    ) -> npt.NDArray[np.float32]:
        config = self.config
        if not config.use_dynamic_shifting:
            shift = np.float32(config.shift)
            return shift * sigmas / (_ONE + np.float32(config.shift - 1) * sigmas)
        factor = mu = self.mu(image_seq_len)
        if config.time_shift_type == "exponential":
            try:
                factor = math.exp(mu)
            except OverflowError:
                factor = math.inf
        elif mu <= 0:
            raise RequestError(
                "sampling: a linear time shift needs mu above 0, got "
                f"{mu:g} for image_seq_len {image_seq_len}; use a larger picture."
            )
        odds = np.float32(factor)
        return odds / (odds + (_ONE / sigmas - _ONE))

    def _stretched(self, sigmas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        terminal = self.config.shift_terminal
        if not terminal:
            return sigmas
        signal = _ONE - sigmas  # share of picture, the counterpart of sigma
        if signal[-1] <= 0:
            raise RequestError(
                f"sampling: shift_terminal {terminal:g} needs a last sigma below 1, "
                f"got {float(sigmas[-1])}; use at least 2 steps."
            )
        scale: np.float32 = signal[-1] / np.float32(1 - terminal)
        return _ONE - signal / scale

    def _respaced(self, sigmas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        config = self.config
        first, last = float(sigmas[0]), float(sigmas[-1])
        ramp = np.linspace(0, 1, sigmas.size)
        respaced: npt.NDArray[np.float64]
        if config.use_karras_sigmas:
            high, low = first ** (1 / _KARRAS_RHO), last ** (1 / _KARRAS_RHO)
            respaced = (high + ramp * (low - high)) ** _KARRAS_RHO
        elif config.use_exponential_sigmas:
            respaced = np.exp(np.linspace(math.log(first), math.log(last), sigmas.size))
        elif config.use_beta_sigmas:
            # Imported here because it costs 0.1 s that no other schedule needs.
            from scipy import special

            quantiles = special.betaincinv(_BETA_SHAPE, _BETA_SHAPE, 1 - ramp)
            respaced = last + quantiles * (first - last)
        else:
            return sigmas
        return respaced.astype(np.float32)


def _typed(name: str, value: object, default: object) -> object:
    """Returns ``value`` if its type fits the setting, whole numbers as float."""
    if isinstance(default, bool):
        expected, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, str):
        expected, fits = "a string", isinstance(value, str)
    elif isinstance(default, int):
        expected, fits = "a whole number", type(value) is int
    elif default is None and value is None:
        return None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    else:
        expected, fits = (
            "a number" if default is not None else "a number or null",
            False,
        )
    _require(fits, name, expected, value)
    return value


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ModelLoadError(
            f"scheduler: {name} must be {expected}, got {got!r}; correct "
            "scheduler_config.json."
        )
