"""Judges a video against its clip: which coloured shapes move, and how.

Knows nothing of the model: each frame is searched as an image of the first demo model
is (:mod:`max_diffusion.demo.checker`), and what is found of one colour is followed from
frame to frame.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np
from PIL import Image

from .checker import FoundObject, Verdict, find_objects
from .clips import CLIP_FRAMES, CLIP_SIZE_PX, Clip, MovingObject
from .scenes import SIZE_PX

# In nine of ten frames exactly the clip's colours are seen; the rest may be a blur.
_MOST_WRONG_FRAMES: Final = 1
# Fractions of a frame's width. What moves goes 0.3 and more, what does not stays.
_LEAST_WAY: Final = 0.2
_MOST_DRIFT: Final = 0.08
# Area of the last frames to that of the first: 3.6 and more where a shape grows.
_LEAST_GROWTH: Final = 2.0
_MOST_CHANGE: Final = 1.4


def check_clip(frames: np.ndarray, clip: Clip) -> Verdict:
    """Compares a video with its clip.

    Args:
        frames: The video, uint8 ``(17, 64, 64, 3)``.
        clip: What it should show. The background counts only where the caption names
            it, and not for ``is_right``.

    Returns:
        The verdict; ``relation_right`` says whether the motions are.

    Raises:
        ValueError: The video has another shape or dtype.
    """
    wanted_shape = (CLIP_FRAMES, CLIP_SIZE_PX, CLIP_SIZE_PX, 3)
    if frames.shape != wanted_shape or frames.dtype != np.uint8:
        raise ValueError(
            f"check_clip: expected uint8 {wanted_shape}, got {frames.dtype} "
            f"{frames.shape}"
        )
    seen = [find_objects(_enlarged(frame)) for frame in frames]
    wanted = sorted(item.colour for item in clip.objects)
    colours = [sorted(item.colour for item in found) for found in seen]
    wrong = sum(found != wanted for found in colours)
    reason = ""
    if wrong > _MOST_WRONG_FRAMES:
        most = Counter(map(tuple, colours)).most_common(1)[0][0]
        reason = (
            f"expected {', '.join(wanted)}; found {', '.join(most) or 'nothing'} in "
            f"most frames, others in {wrong} of {CLIP_FRAMES}"
        )
    else:
        tracks = {
            item.colour: [o for found in seen for o in found if o.colour == item.colour]
            for item in clip.objects
        }
        reason = "; ".join(
            text
            for item in clip.objects
            if (text := _shape_fault(item, tracks[item.colour]))
        )
    objects_right = not reason
    if objects_right:
        reason = "; ".join(
            text
            for item in clip.objects
            if (text := _motion_fault(item, tracks[item.colour]))
        )
    return Verdict(
        is_right=not reason,
        objects_right=objects_right,
        relation_right=objects_right and not reason,
        background_right=True,
        found=seen[-1],
        reason=reason,
    )


def _enlarged(frame: np.ndarray) -> np.ndarray:
    """A frame as large as the images that the search is tuned for."""
    image = Image.fromarray(frame).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _shape_fault(item: MovingObject, track: list[FoundObject]) -> str:
    """What is wrong with an object's shape in most frames, or nothing."""
    shape, _ = Counter(found.shape for found in track).most_common(1)[0]
    return "" if shape == item.shape else f"{item.phrase}: most frames show a {shape}"


def _motion_fault(item: MovingObject, track: list[FoundObject]) -> str:
    """What is wrong with an object's motion, or nothing."""
    motion = seen_motion(track)
    return (
        "" if motion == item.motion else f"{item.phrase}: {motion}, not {item.motion}"
    )


def seen_motion(track: list[FoundObject]) -> str:
    """Names what an object does from the first three frames to the last three.

    Returns:
        One of ``MOTIONS``, ``still``, or ``unclear``.
    """
    rows = np.array([(o.centre_x, o.centre_y, o.area) for o in track], np.float64)
    first, last = rows[:3].mean(axis=0), rows[-3:].mean(axis=0)
    x, y = (last - first)[:2] / SIZE_PX
    growth = last[2] / first[2]
    along, across = max(abs(x), abs(y)), min(abs(x), abs(y))
    is_same_size = 1 / _MOST_CHANGE < growth < _MOST_CHANGE
    if along >= _LEAST_WAY and across <= _MOST_DRIFT and is_same_size:
        if abs(x) > abs(y):
            return "right" if x > 0 else "left"
        return "down" if y > 0 else "up"
    if along <= _MOST_DRIFT:
        if growth >= _LEAST_GROWTH:
            return "growing"
        if growth <= 1 / _LEAST_GROWTH:
            return "shrinking"
        if is_same_size:
            return "still"
    return "unclear"
