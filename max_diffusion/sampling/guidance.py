"""Classifier-free guidance: how two predictions become one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from max.graph import DeviceRef, Module

from graphs.sampler import add_guidance, add_rescaled_guidance

from ..execution.graph_call import GraphCall, Routine
from .sampler import DrawNoise
from .schedule import Schedule


class AbstractGuidance(ABC):
    """A rule of guidance that a model was made for; holds no request's state."""

    graph: ClassVar[str]
    """Name of the graph that combines two predictions: ``conditional, unconditional,
    scale -> prediction``."""

    @abstractmethod
    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the graph that :attr:`graph` names.

        Args:
            module: Module that receives the graph.
            dtype: Dtype of predictions.
            device: Device of predictions.
        """

    def scales(self, scale: float, schedule: Schedule) -> np.ndarray:
        """Returns the guidance scale of every step, float32 ``(num_steps,)``.

        Args:
            scale: Scale that the request asks for; 1 is no guidance.
            schedule: Noise levels of the request.
        """
        return np.full(schedule.num_steps, scale, np.float32)

    def combine(
        self,
        predictions: Sequence[Buffer],
        scale: float,
        device: Device,
        stage: int,
    ) -> Routine[Buffer]:
        """Returns the guided prediction ``(B, S_img, C)`` of one step.

        Args:
            predictions: Predictions for the prompt and for the negative prompt, each
                ``(B, S_img, C)``.
            scale: Guidance scale of this step.
            device: Device of the predictions.
            stage: Stage of the call, see
                :class:`~max_diffusion.execution.graph_call.GraphCall`.
        """
        conditional, unconditional = predictions
        rows = np.full(int(conditional.shape[0]), scale, np.float32)
        inputs = conditional, unconditional, rows
        outputs = yield GraphCall(self.graph, inputs, device, stage=stage)
        return outputs[0]


@final
class LinearGuidance(AbstractGuidance):
    """Guides by ``u + scale * (c - u)``.

    References:
        Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv:2207.12598.
    """

    graph = "guidance"

    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the graph that :attr:`graph` names."""
        add_guidance(module, self.graph, dtype, device)


@final
class RescaledGuidance(AbstractGuidance):
    """Guides by ``u + scale * (c - u)``, each token at the length of its ``c``.

    As QwenImagePipeline of diffusers 0.42 does it: lengths are over the channels of a
    packed token.
    """

    graph = "rescaled_guidance"

    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the graph that :attr:`graph` names."""
        add_rescaled_guidance(module, self.graph, dtype, device)


@final
class DynamicGuidance(AbstractGuidance):
    """Linear guidance whose scale rises over the steps, as CogVideoX does it.

    ``1 + scale * (1 - cos(pi * ((N - t) / N) ** 5)) / 2`` with ``N`` the number of
    steps and ``t`` the timestep, as CogVideoXPipeline of diffusers 0.42 computes it
    with ``use_dynamic_cfg``.
    """

    graph = "guidance"

    def add_graphs(self, module: Module, dtype: DType, device: DeviceRef) -> None:
        """Adds the graph that :attr:`graph` names."""
        add_guidance(module, self.graph, dtype, device)

    def scales(self, scale: float, schedule: Schedule) -> np.ndarray:
        """Returns the guidance scale of every step, float32 ``(num_steps,)``."""
        steps = schedule.num_steps
        return np.array(
            [
                1 + scale * (1 - math.cos(math.pi * ((steps - t) / steps) ** 5)) / 2
                for t in schedule.timesteps.tolist()
            ],
            np.float32,
        )


@final
@dataclass(frozen=True)
class RequestSampling:
    """What of sampling is one request's own, where it is not the model's."""

    guidance: AbstractGuidance | None = None
    """Its rule of guidance, whose graph is the model's; the model's if ``None``."""
    draw_noise: DrawNoise | None = None
    """Draws its noise, for a sampler that ``needs_noise``."""
