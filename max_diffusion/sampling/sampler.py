"""The contract of a sampler: what leads from noise to an image, step by step.

A sampler has two halves. On the host, a configuration becomes a :class:`Schedule`, once
a request. On the device, its graphs turn each prediction into the next latents; what it
remembers between steps belongs to the request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device
from max.dtype import DType
from max.graph import DeviceRef, Module

from ..execution.graph_call import SAMPLER, Routine
from .schedule import Schedule

DrawNoise: TypeAlias = Callable[[], npt.NDArray[np.float32]]
"""Draws fresh standard noise of a request, float32 ``(B, S_img, C)``, from the stream
that its latents were drawn from."""


class AbstractSamplerState(ABC):
    """One request's sampler: its schedule, and what it remembers between steps."""

    @abstractmethod
    def step(
        self, latents: Buffer, prediction: Buffer, step: int, stage: int = SAMPLER
    ) -> Routine[Buffer]:
        """Returns the latents after a step, float32 ``(B, S_img, C)``.

        Args:
            latents: Latents before the step, float32 ``(B, S_img, C)``; not changed.
            prediction: Prediction of the transformer, after guidance, ``(B, S_img, C)``
                in its dtype.
            step: 0-based step index; every step once, in order.
            stage: Stage of the graph call, see
                :class:`~max_diffusion.execution.graph_call.GraphCall`.
        """

    @abstractmethod
    def preview(
        self, latents: Buffer, prediction: Buffer, step: int
    ) -> Routine[Buffer]:
        """Returns the final latents, as far as one prediction tells.

        Args:
            latents: Latents after ``step``, float32 ``(B, S_img, C)``; not changed.
            prediction: Prediction that the step used, ``(B, S_img, C)``.
            step: 0-based step index, not the last one.

        Returns:
            Latents without noise, float32 ``(B, S_img, C)``.
        """


class AbstractSampler(ABC):
    """Creates schedules and samples by them; holds no state of a request.

    ``from_config`` and ``schedule`` may be called in any order and any number of
    times, from any thread; equal arguments give equal schedules.
    """

    needs_noise: ClassVar[bool] = False
    """Whether states draw noise while they step."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Builds the sampler from the contents of a ``scheduler_config.json``.

        Args:
            config: Settings by name. Names that begin with an underscore are notes
                of the program that wrote the file and are passed over.

        Raises:
            ModelLoadError: A setting is unknown, mistyped, out of range or asks for
                something this sampler does not do.
        """

    @abstractmethod
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
            image_seq_len: Image tokens of one sample, at least 1; resolution
                dependent schedules use it, others check it and nothing more.
            sigmas: The caller's own noise levels before any shift, one per step,
                strictly decreasing, in (0, 1], without the final 0.

        Returns:
            A schedule of as many steps as asked for.

        Raises:
            RequestError: An argument breaks a rule above, the two lengths differ, or
                the steps are too many to tell apart in float32.
        """

    @abstractmethod
    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the graphs that states of this sampler call.

        Args:
            module: Module that receives the graphs.
            dtype: Dtype of predictions; latents are float32.
            device: Device of both.
        """

    @abstractmethod
    def create_state(
        self,
        schedule: Schedule,
        batch: int,
        device: Device,
        draw_noise: DrawNoise | None = None,
    ) -> AbstractSamplerState:
        """Creates the fresh state of one request.

        Args:
            schedule: Noise levels of the request, from :meth:`schedule`.
            batch: Number of samples of the request.
            device: Device of the request's latents.
            draw_noise: Draws noise, for a sampler that :attr:`needs_noise`.
        """
