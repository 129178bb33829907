"""Schedulers by the class name that a model folder gives them.

To add one: a module beside ``flow_match_euler.py``, a line in ``SCHEDULERS`` and a row
in the table of ``tests/contracts/test_schedulers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ..errors import ModelLoadError
from .base import AbstractScheduler, Schedule
from .flow_match_euler import FlowMatchEulerConfig, FlowMatchEulerScheduler

__all__ = [
    "SCHEDULERS",
    "AbstractScheduler",
    "FlowMatchEulerConfig",
    "FlowMatchEulerScheduler",
    "Schedule",
    "load_scheduler",
]

SCHEDULERS: Final[Mapping[str, type[AbstractScheduler]]] = MappingProxyType(
    {"FlowMatchEulerDiscreteScheduler": FlowMatchEulerScheduler}
)
"""Scheduler by the ``_class_name`` of diffusers; read-only."""


def load_scheduler(config: Mapping[str, object]) -> AbstractScheduler:
    """Builds the scheduler that a model folder asks for.

    Args:
        config: Contents of ``scheduler_config.json``; ``_class_name`` picks the class.

    Returns:
        The scheduler; it holds nothing of a request and may be shared.

    Raises:
        ModelLoadError: ``_class_name`` is missing or unknown, or the class refuses a
            setting.
    """
    name = config.get("_class_name")
    known = ", ".join(sorted(SCHEDULERS))
    if name is None:
        raise ModelLoadError(
            "scheduler: scheduler_config.json must name a _class_name, got none; known "
            f"are {known}."
        )
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ModelLoadError(
            f"scheduler: unknown _class_name {name!r} in scheduler_config.json; known "
            f"are {known}."
        )
    return SCHEDULERS[name].from_config(config)
