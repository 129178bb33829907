"""The demo models' own judge and prompts, for :mod:`max_diffusion.evaluation`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checker import Verdict, check
from .clips import CLIP_FRAMES, CLIP_SIZE_PX, held_out_clip, parse_clip
from .scenes import SIZE_PX, held_out_scene, parse_caption
from .tracking import check_clip


def judge(prompt: str, frames: np.ndarray) -> Verdict | None:
    """Tells whether an image or a video shows its prompt.

    Args:
        prompt: Any text.
        frames: The image as its only frame, uint8 ``(1, H, W, 3)``, or the video, uint8
            ``(F, H, W, 3)``.

    Returns:
        The verdict; ``None`` for a prompt that is not worded as the captions of the
        demo model are whose frames are so many and so large.
    """
    if frames.shape == (1, SIZE_PX, SIZE_PX, 3):
        scene = parse_caption(prompt)
        return None if scene is None else check(frames[0], scene)
    if frames.shape == (CLIP_FRAMES, CLIP_SIZE_PX, CLIP_SIZE_PX, 3):
        clip = parse_clip(prompt)
        return None if clip is None else check_clip(frames, clip)
    return None


def held_out_prompts(count: int = 12) -> tuple[str, ...]:
    """Returns captions of scenes that the demo model was never trained on.

    Args:
        count: Number of captions, at least 1; the first are the same for any count.

    Returns:
        ``count`` different captions, the same in every call.
    """
    return _different(lambda rng: held_out_scene(rng).caption, count)


def held_out_clip_prompts(count: int = 12) -> tuple[str, ...]:
    """Returns captions of clips that the video demo model was never trained on.

    Args:
        count: Number of captions, at least 1; the first are the same for any count.

    Returns:
        ``count`` different captions, the same in every call.
    """
    return _different(lambda rng: held_out_clip(rng).caption, count)


def _different(
    draw: Callable[[np.random.Generator], str], count: int
) -> tuple[str, ...]:
    rng = np.random.default_rng(5)
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return tuple(found)
