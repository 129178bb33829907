"""The Euler schedule of flow matching, used by FLUX, Qwen-Image, SD3 and others.

Bit for bit the sigmas and timesteps of diffusers' ``FlowMatchEulerDiscreteScheduler``
as ``FluxPipeline`` drives it. The update is that of ``euler``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeAlias, final

import numpy as np
import numpy.typing as npt
from max.driver import Device
from max.dtype import DType
from max.graph import DeviceRef, Module

from graphs.sampler import add_euler_step

from ..errors import ModelLoadError, RequestError
from .euler import GRAPH, EulerState
from .foreign import read_settings, require
from .sampler import AbstractSampler, DrawNoise
from .schedule import Schedule, checked_count, resolve_sigmas

_Sigmas: TypeAlias = npt.NDArray[np.floating]
ShiftExponent: TypeAlias = Callable[[int, int], float]
"""The shift's ``mu`` from the number of image tokens and that of steps."""
_KARRAS_RHO: Final = 7.0
_BETA_SHAPE: Final = 0.6
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
    """Timestep that belongs to sigma 1, at least 1."""

    shift: float = 1.0
    """Static shift, above 0; 1 leaves sigmas alone. Unused with dynamic shifting."""

    use_dynamic_shifting: bool = False
    """Whether to shift by ``mu``, which grows with the image, in place of ``shift``."""

    base_shift: float = 0.5
    """Value of ``mu`` at ``base_image_seq_len`` tokens."""

    max_shift: float = 1.15
    """Value of ``mu`` at ``max_image_seq_len`` tokens; beyond, the line goes on."""

    base_image_seq_len: int = 256
    """Number of image tokens where ``mu`` is ``base_shift``."""

    max_image_seq_len: int = 4096
    """Number of image tokens where ``mu`` is ``max_shift``."""

    invert_sigmas: bool = False
    """Whether the schedule rises (Mochi); only False is supported."""

    shift_terminal: float | None = None
    """Value in [0, 1) that the schedule's last sigma is stretched to; the step from
    there to 0 follows. None and 0 leave the schedule alone."""

    use_karras_sigmas: bool = False
    """Whether to respace evenly in the 7th root of sigma."""

    use_exponential_sigmas: bool = False
    """Whether to respace evenly in the logarithm of sigma."""

    use_beta_sigmas: bool = False
    """Whether to respace by the quantiles of a Beta(0.6, 0.6) distribution."""

    time_shift_type: Literal["exponential", "linear"] = "exponential"
    """Whether the dynamic shift multiplies odds by ``exp(mu)`` or by ``mu``."""

    stochastic_sampling: bool = False
    """Whether each step adds fresh noise; only False is supported."""

    # The rest is no setting of diffusers' own class, but a swap to UniPC, say, and back
    # leaves it in the configuration, and then diffusers obeys it.

    use_flow_sigmas: bool = False
    """Whether to space steps between the ends of the training schedule, not between 1
    and ``1 / n``."""

    sigma_min: float | None = None
    """Last sigma of a respaced schedule; None for the one before respacing."""

    sigma_max: float | None = None
    """First sigma of a respaced schedule; None for the one before respacing."""

    def __post_init__(self) -> None:
        """Refuses settings that cannot be sampled, before a model is loaded."""
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
        if any(respacings.values()):
            for name, sigma in (
                ("sigma_min", self.sigma_min),
                ("sigma_max", self.sigma_max),
            ):
                is_level = sigma is None or 0 < sigma < math.inf
                require(is_level, name, "finite and above 0, or null", sigma)

    def _check_ranges(self) -> None:
        steps = self.num_train_timesteps
        require(steps >= 1, "num_train_timesteps", "at least 1", steps)
        shift = self.shift
        is_ratio = math.isfinite(shift) and shift > 0
        require(is_ratio, "shift", "finite and above 0", shift)
        for name, mu in (
            ("base_shift", self.base_shift),
            ("max_shift", self.max_shift),
        ):
            require(math.isfinite(mu), name, "finite", mu)
        require(
            not self.use_dynamic_shifting
            or self.base_image_seq_len != self.max_image_seq_len,
            "max_image_seq_len",
            "different from base_image_seq_len for dynamic shifting",
            self.max_image_seq_len,
        )
        end = self.shift_terminal
        require(end is None or 0 <= end < 1, "shift_terminal", "in [0, 1) or null", end)
        kind = self.time_shift_type
        expected = f"one of {', '.join(_TIME_SHIFT_TYPES)}"
        require(kind in _TIME_SHIFT_TYPES, "time_shift_type", expected, kind)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, object]) -> Self:
        """Reads the contents of a diffusers ``scheduler_config.json``.

        As there, settings of other schedulers are passed over: a swap to another one
        and back leaves them in the file.

        Args:
            mapping: Settings by name; missing ones take their default, and so do those
                that ``_use_default_values`` lists. Other names that begin with an
                underscore (``_class_name``) are passed over.

        Raises:
            ModelLoadError: A name is unknown, a value has the wrong type or breaks a
                rule of this class.
        """
        return cls(**read_settings(cls, mapping))


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
    ``max_shift``). With ``use_flow_sigmas`` the even spacing is between the largest and
    the smallest sigma of the training schedule, in float64.

    References:
        Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
        Synthesis", 2024, arXiv:2403.03206 (the shift). Karras et al., "Elucidating
        the Design Space of Diffusion-Based Generative Models", 2022,
        arXiv:2206.00364. Lee et al., "Beta Sampling is All You Need", 2024,
        arXiv:2407.12173.
        Differs from diffusers 0.42: what gives NaN or a step of length 0 there is an
        error here, and ``num_inference_steps`` has to agree with ``sigmas``. A single
        sigma of 1 is not stretched to ``shift_terminal``, which gives NaN there: the
        one step goes from 1 to 0.
    """

    def __init__(
        self, config: FlowMatchEulerConfig, mu: ShiftExponent | None = None
    ) -> None:
        """Keeps the configuration; everything else happens in ``schedule``.

        Args:
            config: The settings.
            mu: A model's own rule for the dynamic shift, in place of the line.
        """
        self.config: Final = config
        self._own_mu = mu

    @classmethod
    def from_config(
        cls, config: Mapping[str, object], mu: ShiftExponent | None = None
    ) -> Self:
        """Builds the sampler from the contents of a ``scheduler_config.json``.

        Args:
            config: Settings by name, see ``FlowMatchEulerConfig.from_dict``.
            mu: A model's own rule for the dynamic shift.

        Raises:
            ModelLoadError: See ``FlowMatchEulerConfig.from_dict``; or the settings give
                no schedule for any image that they name the size of.
        """
        scheduler = cls(FlowMatchEulerConfig.from_dict(config), mu)
        lengths = {scheduler.config.base_image_seq_len}
        if scheduler.config.use_dynamic_shifting:
            lengths.add(scheduler.config.max_image_seq_len)
        refused = None
        for length in sorted(lengths):
            try:
                scheduler.schedule(2, image_seq_len=length)
            except RequestError as err:
                refused = err
            else:
                return scheduler
        raise ModelLoadError(
            "scheduler: the settings of scheduler_config.json give no schedule of 2 "
            f"steps for {' or '.join(map(str, sorted(lengths)))} image tokens "
            f"({refused}); correct them"
        ) from refused

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
            RequestError: An argument breaks a rule above, ``sigmas`` are given to a
                scheduler with ``use_flow_sigmas``, or the shifted sigmas do not
                decrease.
        """
        seq_len = checked_count("image_seq_len", image_seq_len)
        if not self.config.use_flow_sigmas:
            spaced: _Sigmas = resolve_sigmas(num_inference_steps, sigmas)
        elif sigmas is None:
            spaced = self._flow_sigmas(resolve_sigmas(num_inference_steps, None).size)
        else:
            raise RequestError(
                "sampling: sigmas have no effect on this model, whose scheduler has "
                "use_flow_sigmas; leave them out"
            )
        # An extreme shift overflows here and is refused by Schedule, with numbers.
        with np.errstate(all="ignore"):
            spaced = self._respaced(self._stretched(self._shifted(spaced, seq_len)))
            rounded = spaced.astype(np.float32)
            return Schedule(
                sigmas=np.append(rounded, np.float32(0)),
                timesteps=rounded * np.float32(self.config.num_train_timesteps),
            )

    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the graph of the Euler step."""
        add_euler_step(module, GRAPH, dtype, device)

    def create_state(
        self,
        schedule: Schedule,
        batch: int,
        device: Device,
        draw_noise: DrawNoise | None = None,
    ) -> EulerState:
        """Creates a request's state, which remembers nothing between steps."""
        return EulerState(schedule, batch, device)

    def mu(self, image_seq_len: int, num_steps: int) -> float:
        """Returns the shift exponent for an image of ``image_seq_len`` tokens.

        Used only with dynamic shifting. Linear in the length, also outside the two
        lengths that define the line, unless the model has a rule of its own.
        """
        if self._own_mu is not None:
            return self._own_mu(image_seq_len, num_steps)
        config = self.config
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        # Not `base_shift + slope * (len - base)`: that rounds differently from the
        # reference, and the last bit of mu is visible in the sigmas.
        return image_seq_len * slope + (
            config.base_shift - slope * config.base_image_seq_len
        )

    def _flow_sigmas(self, num_steps: int) -> npt.NDArray[np.float64]:
        """Spaces sigmas evenly between the training schedule's ends."""
        steps = self.config.num_train_timesteps
        ends = np.array([steps, 1], np.float32) / np.float32(steps)
        if not self.config.use_dynamic_shifting:
            ends = self._shifted(ends, 1).astype(np.float32)
        first, last = (float(end) * steps for end in ends)
        return np.linspace(first, last, num_steps) / steps

    # Numbers beside arrays are Python's below, so that they round as the array does.

    def _shifted(self, sigmas: _Sigmas, image_seq_len: int) -> _Sigmas:
        config = self.config
        if not config.use_dynamic_shifting:
            return config.shift * sigmas / (1 + (config.shift - 1) * sigmas)
        factor = mu = self.mu(image_seq_len, sigmas.size)
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
        return factor / (factor + (1 / sigmas - 1))

    def _stretched(self, sigmas: _Sigmas) -> _Sigmas:
        terminal = self.config.shift_terminal
        signal = 1 - sigmas  # share of image, the counterpart of sigma
        # The first sigma stays where it is, so one alone has nowhere to go.
        if not terminal or signal[-1] <= 0:
            return sigmas
        return 1 - signal / (signal[-1] / (1 - terminal))

    def _respaced(self, sigmas: _Sigmas) -> _Sigmas:
        config = self.config
        first = float(sigmas[0]) if config.sigma_max is None else config.sigma_max
        last = float(sigmas[-1]) if config.sigma_min is None else config.sigma_min
        ramp = np.linspace(0, 1, sigmas.size)
        if config.use_karras_sigmas:
            high, low = first ** (1 / _KARRAS_RHO), last ** (1 / _KARRAS_RHO)
            return (high + ramp * (low - high)) ** _KARRAS_RHO
        if config.use_exponential_sigmas:
            return np.exp(np.linspace(math.log(first), math.log(last), sigmas.size))
        if config.use_beta_sigmas:
            # Imported here because it costs 0.1 s that no other schedule needs.
            from scipy import special

            quantiles = special.betaincinv(_BETA_SHAPE, _BETA_SHAPE, 1 - ramp)
            return np.asarray(last + quantiles * (first - last))
        return sigmas
