"""What a pipeline is given and gives, and what it calls on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from max.driver import Buffer

from ..core.report import RunReport, StepRecord
from ..core.request import GenerationContext
from ..errors import MaxDiffusionError

OnStep = Callable[[int, int], None]
"""Called with ``(steps done, steps)``."""
OnEvent = Callable[[str, str], None]
"""Called with ``("load" | "compile", "start" | "end")``."""


@dataclass(frozen=True)
class DiffusionPipelineOutput:
    """Finished images or videos."""

    frames: np.ndarray
    """uint8 ``(B, F, H, W, 3)``; an image is one frame."""
    steps: tuple[StepRecord, ...] = ()
    """What each step did."""
    cache_bytes: int = 0
    """Most bytes of cache state held at once, all branches together."""
    seconds: Mapping[str, float] | None = None
    """By stage: encode, denoise, decode."""

    @property
    def images(self) -> np.ndarray:
        """The frames of images, uint8 ``(B, H, W, 3)``.

        Raises:
            MaxDiffusionError: There is more than one frame of each.
        """
        return images_of(self.frames)


def images_of(frames: np.ndarray) -> np.ndarray:
    """Frames ``(B, 1, H, W, 3)`` as images ``(B, H, W, 3)``; a view.

    Raises:
        MaxDiffusionError: There is more than one frame of each.
    """
    if frames.shape[1] != 1:
        raise MaxDiffusionError(
            f"images: expected one frame of each, got videos of {frames.shape[1]}; use "
            "frames"
        )
    return frames[:, 0]


@dataclass(frozen=True)
class Denoised:
    """Result of the denoising loop."""

    latents: Buffer
    """float32 ``(B, S_img, C)``."""
    steps: tuple[StepRecord, ...]
    """What each step did."""
    cache_bytes: int
    """Most bytes of cache state held at once, all branches together."""


@dataclass(frozen=True)
class GenerationResult:
    """Images or videos, and how they came about."""

    frames: np.ndarray
    """uint8 ``(B, F, H, W, 3)``; all of the first prompt first. An image is one
    frame."""
    report: RunReport
    """What ``--json`` prints, by ``to_dict()``."""
    fps: float | None = None
    """Frames a second of videos."""

    @property
    def images(self) -> np.ndarray:
        """The frames of images, uint8 ``(B, H, W, 3)``.

        Raises:
            MaxDiffusionError: There is more than one frame of each.
        """
        return images_of(self.frames)


@dataclass(frozen=True)
class GenerationInputs:
    """A request on the device."""

    latents: Buffer
    """Packed noise, float32 ``(B, S_img, C)``."""
    tables: Mapping[str, Buffer]
    """What the transformer reads that is the same of every sample."""
    context: GenerationContext
