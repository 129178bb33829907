"""What a pipeline gives, and what it calls on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from max.driver import Buffer

from ..core.report import StepRecord

OnStep = Callable[[int, int], None]
"""Called with ``(steps done, steps)``."""
OnEvent = Callable[[str, str], None]
"""Called with ``("load" | "compile", "start" | "end")``."""


@dataclass(frozen=True)
class DiffusionPipelineOutput:
    """Finished images."""

    images: np.ndarray
    """uint8 ``(B, H, W, 3)``."""
    steps: tuple[StepRecord, ...] = ()
    """What each step did."""
    cache_bytes: int = 0
    """Most bytes of cache state held at once, all branches together."""
    seconds: Mapping[str, float] | None = None
    """By stage: encode, denoise, decode."""


@dataclass(frozen=True)
class Denoised:
    """Result of the denoising loop."""

    latents: Buffer
    """float32 ``(B, S_img, C)``."""
    steps: tuple[StepRecord, ...]
    """What each step did."""
    cache_bytes: int
    """Most bytes of cache state held at once, all branches together."""
