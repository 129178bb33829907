"""What is drawn: prompts with seeds, settings, and how far it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from painters import STEPS, Painter, picture_of
from varied_caches import VARIED

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    AutoConfig,
    DenoisingCacheConfig,
    NoCacheConfig,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
)
from max_diffusion.evaluation import Setting
from max_diffusion.evaluation.drawing import Drawing, runnable_caches, scenes_of


def test_prompts_are_drawn_each_with_noise_of_its_own() -> None:
    scenes = scenes_of(
        ["a", "b", "c"], 7, seed=3, guidance_scale=2.0, height=32, width=48
    )
    assert (len(scenes), scenes.prompts) == (3, ("a", "b", "c"))
    assert [request.prompts for request in scenes.requests] == [("a",), ("b",), ("c",)]
    assert [request.seed for request in scenes.requests] == [3, 4, 5]
    for request in scenes.requests:
        assert (request.height, request.width) == (32, 48)
        assert (request.guidance_scale, request.num_inference_steps) == (2.0, 7)
        assert request.cache is None
        assert request.options == {}
    options = {"num_frames": 9}
    assert scenes_of("a", 1, options=options).requests[0].options == options
    assert scenes_of("one prompt", 1).prompts == ("one prompt",)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: expected at least one, got []"),
        (None, {}, "prompts: expected at least one, got None"),
        ({"a"}, {}, "prompts: expected at least one, got {'a'}"),
        (["a", 1], {}, "prompts: each must be text, got int"),
        (["a", "\ud800"], {}, "prompts: each: expected UTF-8 text"),
        (["a", "b", "a"], {}, "prompts: 'a' is there twice; give each once"),
        (["a"], {"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        (["a"], {"num_inference_steps": 2.0}, "must be a whole number, got 2.0"),
        (["a"], {"seed": 2**65}, "seed"),
        (["a", "b"], {"seed": 2**64 - 1}, "seed"),
        (["a"], {"height": 0}, "height must be at least 1"),
        (["a"], {"guidance_scale": -1.0}, "guidance_scale must be a number of 0"),
    ],
)
def test_what_cannot_be_drawn_is_told_without_a_model(
    prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        scenes_of(prompts, **{"num_inference_steps": 5} | options)


def test_empty_words_are_a_prompt() -> None:
    assert scenes_of([""], 5).prompts == ("",)


def test_settings_are_labelled() -> None:
    assert Setting.without_cache(7).label == "7 steps"
    assert Setting.without_cache(7, "all").label == "all"
    setting = Setting.with_cache(TaylorSeerConfig(cache_interval=3), 7)
    assert setting.label == "taylorseer:cache_interval=3"
    assert setting.to_dict() == {
        "label": setting.label,
        "cache": "taylorseer",
        "options": {**vars(TaylorSeerConfig(cache_interval=3)), "compute_steps": []},
        "num_inference_steps": 7,
    }


def test_all_caches_are_those_that_the_pipeline_can_run(
    demo: TextToImagePipeline,
) -> None:
    configs, refused = runnable_caches(demo, None, 10)
    assert [type(config) for config in configs] == [
        CACHES[name] for name in ("taylorseer", "auto", "step-mask")
    ]
    assert set(refused) == set(CACHES) - {"none", "taylorseer", "auto", "step-mask"}
    for reason in refused.values():
        assert "needs graphs" in reason


def test_caches_that_are_named_are_taken_in_their_order(
    demo: TextToImagePipeline,
) -> None:
    named: list[str | AbstractCacheConfig] = [
        *("auto", TaylorSeerConfig(3), "taylorseer"),
        VARIED["step-mask"],
    ]
    configs, refused = runnable_caches(demo, named, 10)
    assert configs == (
        *(AutoConfig(), TaylorSeerConfig(3), TaylorSeerConfig()),
        VARIED["step-mask"],
    )
    assert refused == {}
    assert runnable_caches(demo, [], 10) == ((), {})
    documented = DenoisingCacheConfig(taylorseer=True, taylorseer_cache_interval=4)
    assert runnable_caches(demo, [documented], 10)[0] == (TaylorSeerConfig(4),)


def test_none_is_drawn_in_any_case(demo: TextToImagePipeline) -> None:
    for given in ("none", NoCacheConfig()):
        assert runnable_caches(demo, [given, "auto"], 10)[0] == (AutoConfig(),)


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        ("taylorseer", "caches: expected a sequence of names and configurations"),
        ({"auto"}, "caches: expected a sequence of names and configurations"),
        (["tea"], "cache: expected none, taylorseer"),
        ([3], "cache: expected a cache configuration such as TaylorSeerConfig()"),
        (["auto", AutoConfig()], "caches: auto is there twice"),
        (
            [TaylorSeerConfig(3), TaylorSeerConfig(3)],
            "caches: taylorseer:cache_interval=3 is there twice",
        ),
        (["first-block"], "first-block needs graphs that the model was loaded without"),
        (
            [TaylorSeerConfig(compute_steps=(10,))],
            "compute_steps names step 10, but the last of 10 is 9",
        ),
    ],
)
def test_caches_that_are_named_must_run(
    demo: TextToImagePipeline, caches: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        runnable_caches(demo, caches, 10)


def test_drawing_uses_the_settings_cache_and_steps() -> None:
    painter: Any = Painter()
    drawing = Drawing(painter, None)
    [request] = scenes_of("a", STEPS, seed=4).requests
    result = drawing.draw(Setting.with_cache(AutoConfig(), 8), request)
    assert result.report.cache["name"] == "auto"
    assert result.report.num_inference_steps == 8
    assert painter.drawn[0].seed == 4
    assert (result.images[0] == picture_of(4)).mean() > 0.9
    assert drawing.num_drawn == 1


def test_drawing_tells_how_far_it_is() -> None:
    painter: Any = Painter()
    told: list[tuple[float, str]] = []
    drawing = Drawing(painter, lambda share, label: told.append((share, label)))
    drawing.planned = 2
    [request] = scenes_of("a", STEPS).requests
    for count in (4, 2, 1):  # one more than was planned
        drawing.draw(Setting.without_cache(count), request)
    assert told == [
        *((0.125, "4 steps"), (0.25, "4 steps"), (0.375, "4 steps"), (0.5, "4 steps")),
        *((0.75, "2 steps"), (1.0, "2 steps"), (1.0, "1 step")),
    ]


def test_what_progress_raises_ends_the_drawing() -> None:
    painter: Any = Painter()

    def stop(share: float, label: str) -> None:
        raise KeyboardInterrupt

    [request] = scenes_of("a", STEPS).requests
    with pytest.raises(KeyboardInterrupt):
        Drawing(painter, stop).draw(Setting.without_cache(4), request)
    assert painter.drawn == []


def test_everything_is_checked_before_anything_is_drawn() -> None:
    painter: Any = Painter()
    drawing = Drawing(painter, None)
    fine = [Setting.without_cache(STEPS), Setting.with_cache(AutoConfig(), STEPS)]
    drawing.check(fine, scenes_of(["a", "b"], STEPS))
    assert len(painter.contexts) == 2
    with pytest.raises(RequestError, match="no pab here"):
        drawing.check([Setting.with_cache(VARIED["pab"], 5)], scenes_of("a", 5))
    with pytest.raises(RequestError, match="height must be a multiple of 16, got 17"):
        drawing.check(fine, scenes_of("a", STEPS, height=17))
    assert painter.drawn == []
