"""Requests to FLUX.1: defaults, what is told of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from max_diffusion import (
    AutoConfig,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockConfig,
    GenerationRequest,
    MagCacheConfig,
    PabConfig,
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    TextToImagePipeline,
)

if TYPE_CHECKING:
    pass

RATIOS = (1.0,) * 8


def test_nothing_recompiles(flux: TextToImagePipeline) -> None:
    before = flux.compile_count
    for size in (32, 24, 40):
        for prompt in ("a", "a red circle above a blue square " * 3):
            flux.generate(prompt, height=size, width=36, num_inference_steps=2)
    assert flux.compile_count == before


def test_a_long_prompt_is_cut_and_said(flux: TextToImagePipeline) -> None:
    result = flux.generate("red circle " * 5000, num_inference_steps=1)
    assert len(result.report.warnings) == 2
    assert "longer than the 32 tokens" in result.report.warnings[0]


@pytest.mark.parametrize("scale", [None, 0, 0.0, 0.5, 1, 1.0])
def test_guidance_that_asks_for_none_is_accepted(
    flux: TextToImagePipeline, scale: float | None
) -> None:
    request = GenerationRequest(prompts=("a",), guidance_scale=scale)
    context = flux.create_context(request)
    assert (context.warnings, context.guidance_scale) == ((), 0.0)


def test_guidance_without_its_embedding_is_told(flux: TextToImagePipeline) -> None:
    """diffusers ignores it: the picture is the same."""
    asked = flux.generate("a", seed=1, guidance_scale=3.5)
    assert asked.report.warnings == (
        "a guidance scale of 3.5 has no effect: this model has no guidance embedding; "
        "leave it out, or use true guidance",
    )
    assert np.array_equal(asked.images, flux.generate("a", seed=1).images)


def test_defaults_are_the_models_and_told(
    flux: TextToImagePipeline, demo: TextToImagePipeline
) -> None:
    request = GenerationRequest(prompts=("a",))
    few, usual = flux.create_context(request), demo.create_context(request)
    assert (few.num_inference_steps, usual.num_inference_steps) == (4, 28)
    assert usual.guidance_scale == 3.5
    shared = {
        "height": "vae: sample_size",
        "width": "vae: sample_size",
        "max_sequence_length": "tokenizer_2: model_max_length",
    }
    assert few.defaults == shared | {
        "num_inference_steps": "model without guidance embedding"
    }
    assert usual.defaults == shared | {
        "num_inference_steps": "model with guidance embedding",
        "guidance_scale": "diffusers",
    }
    assert DiffusionPipeline.default_num_inference_steps == 50  # the contract's
    all_given = GenerationRequest(
        prompts=("a",),
        height=16,
        width=16,
        sigmas=(1.0, 0.5),
        guidance_scale=1.0,
        options={"max_sequence_length": 5},
    )
    assert demo.create_context(all_given).defaults == {}
    assert flux.generate("a").report.defaults == few.defaults


RATIOS = (1.0,) * 8


@pytest.mark.parametrize(
    ("cache", "none_of", "some_of"),
    [
        (TaylorSeerConfig(), [1, 8, 9], [12]),
        (TaylorSeerConfig(cache_interval=1), [4, 30], []),
        (TaylorSeerConfig(target="attention"), [9], [12]),
        (StepMaskConfig(), [1, 2, 3, 5, 7], [4, 6, 8, 50]),
        (StepMaskConfig(compute_steps=(0, 1, 2)), [3], [4]),
        (StepMaskConfig(compute_steps=(1, 2)), [3], [4]),
        (AutoConfig(), [1, 4], [5]),
        (AutoConfig(max_interval=1), [30], []),
        (FirstBlockConfig(), [1], [2, 8]),
        (FirstBlockConfig(threshold=0.0), [8], []),
        (FirstBlockConfig(warmup_steps=4), [4], [5]),
        (FirstBlockConfig(compute_last=7), [8], [9]),
        (MagCacheConfig(ratios=RATIOS), [1], [4, 8]),
        (MagCacheConfig(ratios=RATIOS, retention_ratio=1.0), [8], []),
        (TeaCacheConfig(coefficients=(1.0, 0.0)), [1, 2], [3]),
        (TeaCacheConfig(threshold=0.0, coefficients=(1.0, 0.0)), [8], []),
        (PabConfig(), [1], [8]),
        (PabConfig(min_timestep=1.0, max_timestep=2.0), [8], []),
        (FasterCacheConfig(), [1], [8]),
        (FasterCacheConfig(attention_interval=1), [8], []),
    ],
    ids=str,
)
def test_a_cache_that_can_skip_nothing_is_told(
    flux: TextToImagePipeline, cache: Any, none_of: list[int], some_of: list[int]
) -> None:
    for steps in (*none_of, *some_of):
        request = GenerationRequest(
            prompts=("a",), num_inference_steps=steps, cache=cache
        )
        warnings = flux.create_context(request).warnings
        told = f"cache: {cache.name} skips none of {steps} steps with these"
        assert len(warnings) == (steps in none_of)
        assert all(warning.startswith(told) for warning in warnings)


def test_a_cache_of_guidance_alone_skips_something(flux: TextToImagePipeline) -> None:
    cache = FasterCacheConfig(attention_interval=1)
    request = GenerationRequest(
        prompts=("a",),
        num_inference_steps=8,
        cache=cache,
        negative_prompt="b",
        true_cfg_scale=2.0,
    )
    assert flux.create_context(request).warnings == ()


def test_what_is_told_of_a_cache_is_what_it_does(flux: TextToImagePipeline) -> None:
    for steps, is_told in ((9, True), (12, False)):
        report = flux.generate(
            "a", num_inference_steps=steps, cache="taylorseer"
        ).report
        assert (report.full_passes == steps) == is_told
        assert (len(report.warnings) == 1) == is_told
    assert flux.generate("a", num_inference_steps=1).report.warnings == ()


def test_a_long_negative_prompt_of_all_is_said_once(flux: TextToImagePipeline) -> None:
    request = GenerationRequest(
        prompts=("a", "b"), negative_prompt="red circle " * 500, true_cfg_scale=2.0
    )
    warnings = flux.create_context(request).warnings
    assert len(warnings) == 2
    assert all(w.startswith("the negative prompt 1 is longer") for w in warnings)
    each = replace(request, negative_prompt=("a", "red circle " * 500))
    warnings = flux.create_context(each).warnings
    assert len(warnings) == 2
    assert all(w.startswith("the negative prompt 2 is longer") for w in warnings)
    alone = replace(request, negative_prompt=None, negative_prompt_2="c")
    assert flux.create_context(alone).warnings[-1] == (
        "the second negative prompt has no effect without a negative prompt"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 1001}, r"width must be a multiple of 4 pixels, got 1001; nearest"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "must be a whole number, got 2.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        (
            {"cache": "tailor"},
            "expected none, taylorseer, first-block, auto, step-mask, magcache, "
            "teacache, pab, fastercache, got",
        ),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0"),
        (
            {"max_sequence_length": 33},
            "max_sequence_length must be 1 to 32 for this model, got 33",
        ),
        ({"max_sequence_length": 2.0}, "must be a whole number, got 2.0"),
        (
            {"frames": 9},
            "frames is no option of FluxPipeline; it has max_sequence_length",
        ),
        ({"seed": [1, 2]}, "2 seeds for pictures: 1; give one for each"),
        ({"seed": []}, "0 seeds for pictures: 1; give one for each"),
        ({"seed": "12"}, "seed must be a whole number, got '12'"),
        ({"prompt_2": ["a", "b"]}, "prompt_2 must be one text, or .* 1; got 2"),
        ({"sigmas": [0.2, 0.9]}, "decreas"),
    ],
)
def test_bad_requests_say_what_is_wrong(
    flux: TextToImagePipeline, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        flux.generate("a", **settings)


def test_a_request_that_fails_leaves_nothing(flux: TextToImagePipeline) -> None:
    wanted = flux.generate("heart", seed=3, num_inference_steps=12, cache="taylorseer")

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux.generate("stars", num_inference_steps=12, cache="taylorseer", on_step=stop)
    again = flux.generate("heart", seed=3, num_inference_steps=12, cache="taylorseer")
    assert np.array_equal(wanted.images, again.images)
