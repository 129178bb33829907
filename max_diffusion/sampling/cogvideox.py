"""The noise schedule of CogVideoX: v-prediction at whole timesteps.

A video ``x0`` is noised as ``sqrt(a) x0 + sqrt(1 - a) noise``, with ``a`` from 1 to 0
over the training timesteps, and the model predicts ``v = sqrt(a) noise - sqrt(1 - a)
x0``. Two samplers walk it: ``cogvideox_ddim`` and ``cogvideox_dpm``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal, Self, final

import numpy as np
import numpy.typing as npt

from ..errors import ModelLoadError, RequestError
from .flow_match_euler import FlowMatchEulerConfig
from .foreign import read_settings, require
from .sampler import AbstractSampler
from .schedule import Schedule, checked_count

_OF_FLOWS: Final = frozenset(item.name for item in fields(FlowMatchEulerConfig))


@final
@dataclass(frozen=True)
class CogVideoXSchedulerConfig:
    """Settings of the schedule, under the names diffusers gives them, as its defaults.

    ``clip_sample`` and its ranges are passed over: diffusers' steps do not read them.

    Raises:
        ModelLoadError: A value is out of range or asks for what these models do not
            have.
    """

    num_train_timesteps: int = 1000
    """Number of training timesteps, at least 2."""

    beta_start: float = 0.00085
    """Share of noise that the first training timestep adds, in (0, 1)."""

    beta_end: float = 0.012
    """Share of noise that the last one adds, in (0, 1)."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = (
        "scaled_linear"
    )
    """How the shares grow; only ``scaled_linear``, by their roots, is supported."""

    trained_betas: tuple[float, ...] | None = None
    """Shares given one by one; only null is supported."""

    set_alpha_to_one: bool = True
    """Whether the last step ends without noise, not at the first training timestep."""

    steps_offset: int = 0
    """What is added to timesteps of ``leading`` spacing."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the model predicts; only ``v_prediction`` is supported."""

    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    """Whether steps are counted from the first training timestep, spread over all, or
    counted from the last."""

    rescale_betas_zero_snr: bool = False
    """Whether the last training timestep is noise alone."""

    snr_shift_scale: float = 3.0
    """Divisor of the signal-to-noise ratio, above 0; 1 leaves it alone."""

    def __post_init__(self) -> None:
        """Refuses settings that cannot be sampled, before a model is loaded."""
        for name, known in (
            ("beta_schedule", "scaled_linear"),
            ("prediction_type", "v_prediction"),
            ("trained_betas", None),
        ):
            given = vars(self)[name]
            require(given == known, name, "null" if known is None else known, given)
        steps = self.num_train_timesteps
        require(steps >= 2, "num_train_timesteps", "at least 2", steps)
        for name in ("beta_start", "beta_end"):
            beta = vars(self)[name]
            require(0 < beta < 1, name, "above 0 and below 1", beta)
        shift = self.snr_shift_scale
        is_ratio = math.isfinite(shift) and shift > 0
        require(is_ratio, "snr_shift_scale", "finite and above 0", shift)
        offset = self.steps_offset
        require(offset >= 0, "steps_offset", "0 or more", offset)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, object]) -> Self:
        """Reads the contents of a diffusers ``scheduler_config.json``.

        Args:
            mapping: Settings by name; settings of other schedulers are passed over.

        Raises:
            ModelLoadError: A name is unknown, a value has the wrong type or breaks a
                rule of this class.
        """
        return cls(**read_settings(cls, mapping, _OF_FLOWS))

    def signal(self) -> npt.NDArray[np.float64]:
        """Returns ``a`` of every training timestep, float64, falling."""
        ends = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        betas = np.linspace(*ends, self.num_train_timesteps) ** 2
        a = np.cumprod(1 - betas)
        a = a / (self.snr_shift_scale + (1 - self.snr_shift_scale) * a)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(a)
            a = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return np.asarray(a, np.float64)


class AbstractCogVideoXSampler(AbstractSampler):
    """What both samplers share: configuration, schedule and the levels of each step.

    References:
        Yang et al., "CogVideoX: Text-to-Video Diffusion Models with An Expert
        Transformer", 2024, arXiv:2408.06072. Lin et al., "Common Diffusion Noise
        Schedules and Sample Steps are Flawed", 2023, arXiv:2305.08891 (zero terminal
        signal-to-noise ratio, trailing timesteps).
        Differs from diffusers 0.42: some step counts with ``trailing`` spacing, 61
        among them, take a step more there, at timestep -1, that spoils the video; and
        what is called ``sigma`` here is ``sqrt(1 - a)``, which is 0 after the last
        step even where that ends a little above.
    """

    def __init__(self, config: CogVideoXSchedulerConfig) -> None:
        """Keeps the configuration, and ``a`` of every training timestep.

        Args:
            config: The settings.
        """
        self.config: Final = config
        self._signal: Final = config.signal()

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Builds the sampler from the contents of a ``scheduler_config.json``.

        Args:
            config: Settings by name, see :class:`CogVideoXSchedulerConfig`.

        Raises:
            ModelLoadError: See :meth:`CogVideoXSchedulerConfig.from_dict`.
        """
        return cls(CogVideoXSchedulerConfig.from_dict(config))

    @abstractmethod
    def rows(self, timesteps: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Returns the coefficients of every step, a row each.

        Args:
            timesteps: Of all steps, from :meth:`schedule`.
        """

    def schedule(
        self,
        num_inference_steps: int | None,
        *,
        image_seq_len: int,
        sigmas: Sequence[float] | npt.NDArray[np.floating] | None = None,
    ) -> Schedule:
        """Computes the sigmas and timesteps of one request.

        Args:
            num_inference_steps: Number of denoising steps, 1 to
                ``num_train_timesteps``.
            image_seq_len: Image tokens of one sample, at least 1; without effect.
            sigmas: None: timesteps are those that the model was trained at.

        Returns:
            Whole timesteps, and ``sqrt(1 - a)`` at each.

        Raises:
            RequestError: An argument breaks a rule above.
            ModelLoadError: ``steps_offset`` leads beyond the training timesteps.
        """
        checked_count("image_seq_len", image_seq_len)
        if sigmas is not None:
            raise RequestError(
                "sampling: sigmas have no effect on this model, whose steps are at the "
                "timesteps it was trained at; leave them out"
            )
        if num_inference_steps is None:
            raise RequestError(
                "sampling: num_inference_steps is needed, got none; pass for example 50"
            )
        count = checked_count("num_inference_steps", num_inference_steps)
        trained = self.config.num_train_timesteps
        if count > trained:
            raise RequestError(
                f"sampling: num_inference_steps must be at most {trained}, the "
                f"timesteps the model was trained at, got {count}"
            )
        timesteps = self._timesteps(count)
        if timesteps[0] >= trained:
            raise ModelLoadError(
                f"scheduler: with steps_offset {self.config.steps_offset} the first of "
                f"{count} steps is at timestep {timesteps[0]}, and the last one "
                f"trained is {trained - 1}; correct scheduler_config.json."
            )
        levels = np.sqrt(1 - self._signal[timesteps])
        return Schedule(
            np.append(levels, 0).astype(np.float32), timesteps.astype(np.float32)
        )

    def _timesteps(self, count: int) -> npt.NDArray[np.int64]:
        """Spaces ``count`` timesteps, falling."""
        config, trained = self.config, self.config.num_train_timesteps
        if config.timestep_spacing == "linspace":
            return np.linspace(0, trained - 1, count).round()[::-1].astype(np.int64)
        if config.timestep_spacing == "leading":
            steps = np.arange(count, dtype=np.int64)[::-1] * (trained // count)
            return steps + config.steps_offset
        spaced = np.arange(trained, 0, -trained / count)[:count]
        return spaced.round().astype(np.int64) - 1

    def levels(
        self, timesteps: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Returns ``a`` before and after every step, float64.

        A step leads ``num_train_timesteps // num_steps`` back, as diffusers' does,
        wherever the next timestep is.
        """
        now = timesteps.astype(np.int64)
        after = now - self.config.num_train_timesteps // now.size
        last = 1.0 if self.config.set_alpha_to_one else self._signal[0]
        found = np.where(after < 0, last, self._signal[np.maximum(after, 0)])
        return self._signal[now], found
