"""The video demo model's clips: captions are read back, videos are judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from max_diffusion.demo import (
    check_clip,
    held_out_clip,
    held_out_clip_prompts,
    judge,
    parse_clip,
)
from max_diffusion.demo.clips import (
    CLIP_COLOURS,
    CLIP_FRAMES,
    CLIP_SIZE_PX,
    MOTIONS,
    Clip,
    MovingObject,
    cell_labels,
    draw_clip,
    is_held_out_clip,
    random_clip,
    training_clip,
)


def told(clip: Clip) -> list[tuple[str, str, str]]:
    return [(item.colour, item.shape, item.motion) for item in clip.objects]


def clip_of(count: int, rng: np.random.Generator) -> Clip:
    while len((clip := random_clip(rng)).objects) != count:
        pass
    return clip


def test_captions_are_read_back() -> None:
    rng = np.random.default_rng()
    for _ in range(300):
        clip = random_clip(rng)
        read = parse_clip(clip.caption[0].upper() + clip.caption[1:] + ".")
        assert read is not None
        assert told(read) == told(clip)
        named = clip.background if "background" in clip.caption else ""
        assert read.background == named


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red hexagon moving right",
        "a red star moving right",
        "a red circle moving right on a mint background",
        "a red circle moving right and a red square rising",
        "a red circle rising, a blue square falling",
        "a red circle rising and a blue square rising and a pink square rising",
    ],
)
def test_other_texts_are_no_captions(text: str) -> None:
    assert parse_clip(text) is None


def test_objects_stay_inside_and_apart() -> None:
    rng = np.random.default_rng()
    for _ in range(200):
        clip = random_clip(rng)
        for frame in range(CLIP_FRAMES):
            now = [item.at(frame) for item in clip.objects]
            for item in now:
                assert item.radius < item.centre_x < 1 - item.radius
                assert item.radius < item.centre_y < 1 - item.radius
            if len(now) == 2:
                a, b = now
                gap = np.hypot(a.centre_x - b.centre_x, a.centre_y - b.centre_y)
                assert gap > 1.3 * (a.radius + b.radius)


def test_what_is_kept_for_evaluation_is_never_trained_on() -> None:
    rng = np.random.default_rng(1)
    held_out = [told(held_out_clip(rng)) for _ in range(200)]
    trained = [told(training_clip(rng)) for _ in range(2000)]
    assert not {tuple(sorted(t)) for t in held_out} & {
        tuple(sorted(t)) for t in trained
    }
    prompts = held_out_clip_prompts(20)
    assert len(set(prompts)) == 20
    assert held_out_clip_prompts(5) == prompts[:5]
    for text in prompts:
        clip = parse_clip(text)
        assert clip is not None
        assert is_held_out_clip(clip)


@pytest.mark.parametrize("count", [1, 2])
def test_drawn_clips_are_right_and_others_are_not(count: int) -> None:
    rng = np.random.default_rng(count)
    for noise in (0, 8):
        clip = clip_of(count, rng)
        drawn = draw_clip(clip)
        noisy = drawn + rng.normal(0, noise, drawn.shape)
        frames = np.clip(noisy, 0, 255).astype(np.uint8)
        verdict = check_clip(frames, clip)
        assert verdict.is_right, verdict.reason
        item = clip.objects[0]
        others: dict[str, Any] = {
            "colour": next(
                c for c in CLIP_COLOURS if c not in {o.colour for o in clip.objects}
            ),
            "shape": "square" if item.shape != "square" else "circle",
            "motion": MOTIONS[(MOTIONS.index(item.motion) + 1) % len(MOTIONS)],
        }
        for field, value in others.items():
            other = replace(item, **{field: value})
            asked = replace(clip, objects=(other, *clip.objects[1:]))
            wrong = check_clip(frames, asked)
            assert not wrong.is_right
            assert wrong.objects_right is (field == "motion")
            assert value in wrong.reason


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_backwards_is_not_the_motion(motion: str) -> None:
    rng = np.random.default_rng(7)
    while (clip := clip_of(1, rng)).objects[0].motion != motion:
        pass
    frames = draw_clip(clip)
    assert check_clip(frames, clip).is_right
    verdict = check_clip(frames[::-1], clip)
    assert verdict.objects_right
    assert not verdict.relation_right


def test_a_still_image_moves_nothing() -> None:
    clip = clip_of(1, np.random.default_rng(3))
    still = np.repeat(draw_clip(clip)[:1], CLIP_FRAMES, axis=0)
    verdict = check_clip(still, clip)
    assert not verdict.is_right
    assert f"still, not {clip.objects[0].motion}" in verdict.reason


def test_an_object_that_vanishes_is_missed() -> None:
    clip = clip_of(2, np.random.default_rng(4))
    frames = draw_clip(clip).copy()
    frames[-4:] = draw_clip(replace(clip, objects=clip.objects[:1]))[-4:]
    verdict = check_clip(frames, clip)
    assert not verdict.objects_right
    assert "in 4 of 17" in verdict.reason


def test_videos_of_another_shape_are_refused() -> None:
    clip = clip_of(1, np.random.default_rng(5))
    frames = draw_clip(clip)
    for other in (frames[:9], frames[:, :32], frames.astype(np.float32)):
        with pytest.raises(ValueError, match="check_clip: expected uint8"):
            check_clip(other, clip)
    assert judge(clip.caption, frames[:9]) is None
    assert judge("a cat that runs", frames) is None
    verdict = judge(clip.caption, frames)
    assert verdict is not None
    assert verdict.is_right


def test_cells_tell_what_covers_them() -> None:
    nowhere = (0.5, 0.5, 0.1)
    square = MovingObject("square", "red", "right", (0.25, 0.25, 0.2), nowhere)
    circle = MovingObject("circle", "blue", "up", (0.75, 0.75, 0.2), nowhere)
    labels = cell_labels(Clip((square, circle), "gray", ""), 0, 2)
    assert labels.tolist() == [0, -1, -1, 1]
    assert draw_clip(Clip((square,), "gray", "")).shape == (17, CLIP_SIZE_PX, 64, 3)
