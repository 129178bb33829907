"""What the demo model brings for its evaluation: a judge and prompts."""

from __future__ import annotations

import numpy as np

from max_diffusion.demo import check, held_out_prompts, judge, parse_caption
from max_diffusion.demo.scenes import draw, is_held_out, random_scene


def test_a_judge_is_the_checker_where_it_can_tell() -> None:
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(12)]
    for scene, other in zip(scenes, [*scenes[1:], scenes[0]], strict=True):
        image = draw(scene)
        own, wrong = (judge(s.caption, image[None]) for s in (scene, other))
        assert own is not None
        assert own.is_right
        assert own.reason == ""
        assert wrong is not None
        parsed = parse_caption(other.caption)
        assert parsed is not None
        wanted = check(image, parsed)
        assert (wrong.is_right, wrong.reason) == (wanted.is_right, wanted.reason)
        assert not wrong.is_right
        assert wrong.reason


def test_a_judge_says_nothing_of_other_prompts_and_sizes() -> None:
    image = draw(random_scene(np.random.default_rng(0)))
    for text in ("", "a photo of a cat", "two red circles", "a red circle, please"):
        assert judge(text, image[None]) is None
    for size in ((64, 64), (128, 64), (256, 256)):
        assert judge("a red circle", np.zeros((1, *size, 3), np.uint8)) is None


def test_a_judge_says_nothing_of_videos() -> None:
    scene = random_scene(np.random.default_rng(0))
    frames = np.stack([draw(scene)] * 2)
    assert judge(scene.caption, frames[:1]) is not None
    assert judge(scene.caption, frames) is None


def test_held_out_prompts_are_scenes_it_was_never_trained_on() -> None:
    found = held_out_prompts(12)
    assert len(set(found)) == len(found) == 12
    assert held_out_prompts(12) == found
    assert held_out_prompts(30)[:12] == found
    assert held_out_prompts() == found
    for text in found:
        scene = parse_caption(text)
        assert scene
        if " on a " in text or len(scene.objects) > 1:  # one alone needs its ground
            assert is_held_out(scene)
