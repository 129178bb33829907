"""The demo model's scenes: captions are read back, pictures are judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from max_diffusion.demo import Scene, check, parse_caption
from max_diffusion.demo.scenes import (
    COLOURS,
    RELATION_PHRASES,
    SHAPES,
    SceneObject,
    draw,
    held_out_scene,
    random_scene,
)


def shown(scene: Scene) -> list[tuple[str | None, str, str]]:
    return [(item.size, item.colour, item.shape) for item in scene.objects]


def test_every_caption_is_read_as_its_scene() -> None:
    rng = np.random.default_rng(1)
    relations = set()
    for _ in range(2000):
        scene = random_scene(rng)
        found = parse_caption(scene.caption)
        assert found, scene.caption
        assert (shown(found), found.relation) == (shown(scene), scene.relation)
        is_named = scene.caption.endswith((" background", " gradient"))
        assert found.background == (scene.background if is_named else ("gray", "gray"))
        assert found.caption == scene.caption
        relations.add(found.relation)
    assert relations == {None, "row", "stack", *RELATION_PHRASES}


@pytest.mark.parametrize(
    ("text", "relation", "background"),
    [
        ("a red circle", None, ("gray", "gray")),
        ("a red circle on a navy background", None, ("navy", "navy")),
        ("a red circle and a small blue heart", None, ("gray", "gray")),
        ("a red circle in a blue square", "inside", ("gray", "gray")),
        (
            "a red circle on top of an orange star on a mint to cream gradient",
            "above",
            ("mint", "cream"),
        ),
        (
            "a red circle, a red circle and a pink star in a row",
            "row",
            ("gray", "gray"),
        ),
    ],
)
def test_captions_name_relation_and_background(
    text: str, relation: str | None, background: tuple[str, str]
) -> None:
    scene = parse_caption(text)
    assert scene
    assert (scene.relation, scene.background) == (relation, background)
    assert all((o.centre_x, o.centre_y, o.radius) == (0, 0, 0) for o in scene.objects)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two green stars",
        "a cat",
        "red circle",
        "a red circle and",
        "a red circle and a cat",
        "a huge red circle",
        "a red circle on a red background",
        "a red circle on a navy to red gradient",
        "a red circle near a blue square",
        "a red circle, a blue star and a pink heart",
        "a red circle and a blue star in a row",
        "a red circle stacked",
        "a red circle above a blue star above a pink heart",
        "a red circle above a blue star and a pink heart",
        "a red circle\n",
        "a red\ncircle",
        "\n",
        "A red circle",
        "a red circle, a red circle, a red circle and a red circle in a row",
    ],
)
def test_other_words_are_no_scene(text: str) -> None:
    assert parse_caption(text) is None


def test_drawn_scenes_are_judged_right() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        scene = held_out_scene(rng)
        verdict = check(draw(scene), scene)
        assert verdict.is_right, (scene.caption, verdict.reason)
        assert (verdict.reason, verdict.background_right) == ("", True)
        # What its caption says suffices.
        parsed = parse_caption(scene.caption)
        assert parsed
        assert check(draw(scene), parsed).is_right


def changed(scene: Scene, **values: Any) -> Scene:
    first, *others = scene.objects
    return replace(scene, objects=(replace(first, **values), *others))


def test_another_colour_or_shape_is_judged_wrong() -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        scene = held_out_scene(rng)
        item = scene.objects[0]
        colour = next(name for name in COLOURS if name != item.colour)
        shape = next(name for name in SHAPES if name != item.shape)
        for other in (changed(scene, colour=colour), changed(scene, shape=shape)):
            verdict = check(draw(scene), other)
            assert not verdict.is_right
            assert not verdict.objects_right
            assert verdict.reason.startswith("expected ")


OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "left of",
    "row": "stack",
    "stack": "row",
}


def test_another_relation_or_background_is_told() -> None:
    rng = np.random.default_rng(4)
    scenes = [held_out_scene(rng) for _ in range(30)]
    related = [scene for scene in scenes if scene.relation]
    assert len(related) > 10
    for scene in related:
        assert scene.relation
        other = replace(scene, relation=OPPOSITES[scene.relation])
        verdict = check(draw(scene), other)
        assert verdict.objects_right, scene.caption
        assert not verdict.is_right
        assert verdict.reason == f"objects are right, but not {other.relation}"
    one = SceneObject("circle", "red", None, 0.5, 0.5, 0.2)
    navy = Scene((one,), None, ("navy", "navy"), "a red circle on a navy background")
    verdict = check(draw(replace(navy, background=("mint", "mint"))), navy)
    assert (verdict.is_right, verdict.background_right) == (True, False)


def test_what_is_missing_or_too_many_is_told() -> None:
    one = SceneObject("circle", "red", None, 0.3, 0.5, 0.15)
    two = SceneObject("star", "blue", None, 0.7, 0.5, 0.15)
    both = Scene((one, two), None, ("cream", "cream"), "")
    alone = replace(both, objects=(one,))
    nothing = replace(both, objects=())
    verdict = check(draw(alone), both)
    assert verdict.reason == "expected blue star, red circle; found red circle"
    verdict = check(draw(both), alone)
    assert verdict.reason == "expected red circle; found blue star, red circle"
    verdict = check(draw(nothing), alone)
    assert verdict.reason == "expected red circle; found nothing"


def test_pictures_of_another_size_are_no_pictures() -> None:
    scene = parse_caption("a red circle")
    assert scene
    with pytest.raises(ValueError, match=r"expected uint8 \(128, 128, 3\), got uint8"):
        check(np.zeros((128, 96, 3), np.uint8), scene)
    with pytest.raises(ValueError, match="got float64"):
        check(np.zeros((128, 128, 3)), scene)
