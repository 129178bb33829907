"""Samplers by the class name that a model folder gives its scheduler; and guidance.

To add a sampler: a module beside ``flow_match_euler.py``, a line in ``SAMPLERS`` and a
row in the table of ``tests/contracts/test_samplers.py``. It brings its own graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ..errors import ModelLoadError
from .cogvideox import CogVideoXSchedulerConfig
from .cogvideox_ddim import CogVideoXDDIMSampler
from .cogvideox_dpm import CogVideoXDPMSampler
from .flow_match_euler import FlowMatchEulerConfig, FlowMatchEulerSampler
from .guidance import (
    AbstractGuidance,
    DynamicGuidance,
    LinearGuidance,
    RequestSampling,
    RescaledGuidance,
)
from .kept_picture import KeptPicture
from .sampler import AbstractSampler, AbstractSamplerState, DrawNoise
from .schedule import Schedule

__all__ = [
    "SAMPLERS",
    "AbstractGuidance",
    "AbstractSampler",
    "AbstractSamplerState",
    "CogVideoXDDIMSampler",
    "CogVideoXDPMSampler",
    "CogVideoXSchedulerConfig",
    "DrawNoise",
    "DynamicGuidance",
    "FlowMatchEulerConfig",
    "FlowMatchEulerSampler",
    "KeptPicture",
    "LinearGuidance",
    "RequestSampling",
    "RescaledGuidance",
    "Schedule",
    "load_sampler",
]

SAMPLERS: Final[Mapping[str, type[AbstractSampler]]] = MappingProxyType(
    {
        "CogVideoXDDIMScheduler": CogVideoXDDIMSampler,
        "CogVideoXDPMScheduler": CogVideoXDPMSampler,
        "FlowMatchEulerDiscreteScheduler": FlowMatchEulerSampler,
    }
)
"""Sampler classes by the ``_class_name`` of diffusers' scheduler; read-only."""


def load_sampler(config: Mapping[str, object]) -> AbstractSampler:
    """Builds the sampler that a model folder asks for.

    Args:
        config: Contents of ``scheduler_config.json``; ``_class_name`` picks the class.

    Returns:
        The sampler; it holds nothing of a request and may be shared.

    Raises:
        ModelLoadError: ``_class_name`` is missing or unknown, or the class refuses a
            setting.
    """
    name = config.get("_class_name")
    known = ", ".join(sorted(SAMPLERS))
    if name is None:
        raise ModelLoadError(
            "scheduler: scheduler_config.json must name a _class_name, got none; known "
            f"are {known}."
        )
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ModelLoadError(
            f"scheduler: unknown _class_name {name!r} in scheduler_config.json; known "
            f"are {known}."
        )
    return SAMPLERS[name].from_config(config)
