"""A job: what the engine knows of a request that it has taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

from ..core.request import GenerationContext
from ..denoising.loop import Denoising
from .memory import Needed
from .requests import RequestHandle, SubmitOptions


@final
@dataclass(eq=False)
class Job:
    """A request inside of the engine; two are equal only if they are one."""

    handle: RequestHandle
    """What its owner sees of it."""
    context: GenerationContext
    """Its checked values, tokens and noise."""
    options: SubmitOptions
    """How it is treated."""
    needed: Needed
    """Its slot in the memory plan."""
    order: int
    """Its place in the order of submission, from 1."""
    submitted: float
    """When it was submitted, in seconds of ``time.monotonic()``."""
    denoising: Denoising | None = None
    """Its loop, from the end of encoding to the last step."""
    preview_steps: tuple[int, ...] = ()
    """Counts of steps after which it is due a preview, in rising order."""
    used: float = 0.0
    """The share of the device it has had: its work over 2^priority."""
    work: float = 0.0
    """What its steps took of the device: samples x tokens x branches, added up."""
    is_cancelled: bool = False
    """Whether it is to end before its next step."""
    encoded: float = 0.0
    """When its encoding ended, in seconds of ``time.monotonic()``."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that each of its phases took: encode, denoise, decode."""

    @property
    def cache_name(self) -> str:
        """The registered name of its cache."""
        return self.context.cache.config.name

    @property
    def deadline(self) -> float:
        """When it begins to be late, in seconds of ``time.monotonic()``."""
        timeout = self.options.timeout
        return math.inf if timeout is None else self.submitted + timeout
