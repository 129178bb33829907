"""The demo model's own judge and prompts, for :mod:`max_diffusion.evaluation`."""

from __future__ import annotations

import numpy as np

from .checker import Verdict, check
from .scenes import SIZE_PX, held_out_scene, parse_caption


def judge(prompt: str, frames: np.ndarray) -> Verdict | None:
    """Tells whether an image shows its prompt; of videos it tells nothing.

    Args:
        prompt: Any text.
        frames: The image as its only frame, uint8 ``(1, H, W, 3)``.

    Returns:
        The verdict; ``None`` for a prompt that is not worded as the demo model's
        captions are, an image that is not 128 pixels high and wide, or a video.
    """
    if frames.shape != (1, SIZE_PX, SIZE_PX, 3):
        return None
    scene = parse_caption(prompt)
    return None if scene is None else check(frames[0], scene)


def held_out_prompts(count: int = 12) -> tuple[str, ...]:
    """Returns captions of scenes that the demo model was never trained on.

    Args:
        count: Number of captions, at least 1; the first are the same for any count.

    Returns:
        ``count`` different captions, the same in every call.
    """
    rng = np.random.default_rng(5)
    found: dict[str, None] = {}
    while len(found) < count:
        found[held_out_scene(rng).caption] = None
    return tuple(found)
