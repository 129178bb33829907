"""Who tells whether an image shows its prompt: handed in, because no one tells of all.

A judge of your own is any callable of this form; the demo model's is
:func:`max_diffusion.demo.judge`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ..errors import RequestError


@runtime_checkable
class Verdict(Protocol):
    """What a judge says of one image."""

    @property
    def is_right(self) -> bool:
        """Whether the image shows its prompt."""

    @property
    def reason(self) -> str:
        """What is wrong with the image; empty where it is right."""


class Judge(Protocol):
    """Tells whether an image shows its prompt."""

    def __call__(self, prompt: str, image: np.ndarray, /) -> Verdict | None:
        """Judges one image.

        Args:
            prompt: The prompt that the image was drawn for.
            image: The image, uint8 ``(H, W, 3)``. Not to be modified.

        Returns:
            The verdict, or ``None`` where the judge cannot tell: it does not
            understand the prompt, or knows nothing of images of this size.
        """


def checked_judge(where: str, judge: object) -> None:
    """Refuses what is no judge, before anything is drawn for it.

    Raises:
        RequestError: ``judge`` is neither ``None`` nor can be called.
    """
    if judge is not None and not callable(judge):
        raise RequestError(
            f"{where}: expected a judge that is called with a prompt and an image, got "
            f"{judge!r}"
        )


def judged(judge: Judge, prompt: str, image: np.ndarray) -> Verdict | None:
    """Asks a judge about one image and checks what it returns.

    Raises:
        RequestError: The judge returned neither a verdict nor ``None``.
    """
    found: object = judge(prompt, image)
    if found is not None and not isinstance(found, Verdict):
        raise RequestError(
            "judge: expected a verdict with is_right and reason, or None, got "
            f"{found!r} for {prompt!r}"
        )
    return found
