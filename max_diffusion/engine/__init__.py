"""Many requests on one device, batched step by step, each with its own cache."""

from __future__ import annotations

from .config import EngineConfig
from .engine import Engine
from .observer import EngineObserver, EngineStats, TurnRecord
from .requests import (
    MAX_PREVIEWS,
    MAX_PRIORITY,
    DeadlineError,
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    Preview,
    QueueFullError,
    RequestHandle,
    Started,
    State,
    StepTaken,
    SubmitOptions,
)

__all__ = [
    "MAX_PREVIEWS",
    "MAX_PRIORITY",
    "DeadlineError",
    "Engine",
    "EngineConfig",
    "EngineObserver",
    "EngineStats",
    "EngineStoppedError",
    "Event",
    "Failed",
    "Finished",
    "Preview",
    "QueueFullError",
    "RequestHandle",
    "Started",
    "State",
    "StepTaken",
    "SubmitOptions",
    "TurnRecord",
]
