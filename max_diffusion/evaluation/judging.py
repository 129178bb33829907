"""Who tells whether a picture shows its prompt: handed in, as no one tells of all.

A judge of your own is any callable of this form; the demo model's is
:func:`max_diffusion.demo.judge`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ..errors import RequestError


@runtime_checkable
class Verdict(Protocol):
    """What a judge says of one image or video."""

    @property
    def is_right(self) -> bool:
        """Whether the image or video shows its prompt."""

    @property
    def reason(self) -> str:
        """What is wrong with it; empty where it is right."""


class Judge(Protocol):
    """Tells whether an image or a video shows its prompt."""

    def __call__(self, prompt: str, frames: np.ndarray, /) -> Verdict | None:
        """Judges one image or one video.

        Args:
            prompt: The prompt that the frames were drawn for.
            frames: All frames, uint8 ``(F, H, W, 3)``; an image is one frame. Not to
                be modified.

        Returns:
            The verdict, or ``None`` where the judge cannot tell: it does not
            understand the prompt, or knows nothing of frames of this size or of so
            many.
        """


def checked_judge(where: str, judge: object) -> None:
    """Refuses what is no judge, before anything is drawn for it.

    Raises:
        RequestError: ``judge`` is neither ``None`` nor can be called.
    """
    if judge is not None and not callable(judge):
        raise RequestError(
            f"{where}: expected a judge that is called with a prompt and frames, got "
            f"{judge!r}"
        )


def judged(judge: Judge, prompt: str, frames: np.ndarray) -> Verdict | None:
    """Asks a judge about the frames of one prompt and checks what it returns.

    Raises:
        RequestError: The judge returned neither a verdict nor ``None``.
    """
    found: object = judge(prompt, frames)
    if found is not None and not isinstance(found, Verdict):
        raise RequestError(
            "judge: expected a verdict with is_right and reason, or None, got "
            f"{found!r} for {prompt!r}"
        )
    return found
