"""Pictures that start from pictures, against diffusers' pipelines."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from cache_rows import ROWS, STEPS
from folders import CAPTIONS, copy_folder
from pictures import mask_of, scene, worst
from safetensors.numpy import load_file, save_file

from max_diffusion import (
    GenerationRequest,
    MagCacheConfig,
    ModelLoadError,
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
    TextToImagePipeline,
    open_model,
)
from max_diffusion.core.pictures import Picture, PictureInputs

if TYPE_CHECKING:
    from diffusers import FluxPipeline

BAR = 50.0
"""Decibels of every picture against diffusers'."""


@dataclass(frozen=True)
class Pair:
    """One model folder in both implementations."""

    ours: TextToImagePipeline
    theirs: FluxPipeline

    def draw(
        self,
        kind: str,
        prompt: str | list[str],
        seed: int | list[int],
        **settings: Any,
    ) -> np.ndarray:
        """The pictures of a diffusers pipeline of this name, as uint8."""
        import diffusers

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the oracle's own
            pipeline = getattr(diffusers, kind)(**self.theirs.components)
        pipeline.set_progress_bar_config(disable=True)
        seeds = seed if isinstance(seed, list) else [seed]
        generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
        pictures = pipeline(
            prompt=prompt,
            generator=generators if isinstance(seed, list) else generators[0],
            output_type="np",
            guidance_scale=3.5,  # theirs is 7 where there is a picture
            max_sequence_length=self.theirs.tokenizer_2.model_max_length,
            **settings,
        ).images
        return (pictures * 255).round().astype(np.uint8)


@pytest.fixture(params=["random", "demo"])
def pair(request: pytest.FixtureRequest) -> Pair:
    names = {
        "random": ("flux", "reference"),
        "demo": ("demo_pictures", "demo_reference"),
    }
    return Pair(*map(request.getfixturevalue, names[request.param]))


@pytest.mark.parametrize(
    ("picture", "drawn", "strength", "steps"),
    [
        ((40, 56), (32, 48), 0.6, 5),
        ((64, 64), (64, 64), 1.0, 3),
        ((33, 97), (48, 32), 0.15, 7),
    ],
)
def test_a_picture_from_a_picture_equals_diffusers(
    pair: Pair,
    picture: tuple[int, int],
    drawn: tuple[int, int],
    strength: float,
    steps: int,
) -> None:
    image = scene(*picture)
    size: dict[str, Any] = {"height": drawn[0], "width": drawn[1]}
    size["num_inference_steps"] = steps
    ours = pair.ours.generate(
        CAPTIONS[0], image=image, strength=strength, seed=5, **size
    )
    theirs = pair.draw(
        "FluxImg2ImgPipeline", CAPTIONS[0], 5, image=image, strength=strength, **size
    )
    assert worst(ours.images, theirs) >= BAR


def test_prompts_pictures_and_guidance_equal_diffusers(pair: Pair) -> None:
    image = scene(48, 48, 1)
    settings: dict[str, Any] = {
        "num_inference_steps": 6,
        "num_images_per_prompt": 2,
        "negative_prompt": ["gray", "dark"],
        "true_cfg_scale": 2.5,
        "height": 32,
        "width": 48,
        "strength": 0.5,
    }
    ours = pair.ours.generate(CAPTIONS[:2], image=image, seed=9, **settings)
    theirs = pair.draw("FluxImg2ImgPipeline", CAPTIONS[:2], 9, image=image, **settings)
    assert worst(ours.images, theirs) >= BAR


def test_a_seed_a_picture_is_the_picture_alone(pair: Pair) -> None:
    """diffusers draws so where it is given the picture once for each generator."""
    image, size = scene(32, 32, 2), {"height": 32, "width": 32}
    settings: dict[str, Any] = {**size, "num_inference_steps": 4, "strength": 0.7}
    ours = pair.ours.generate(
        CAPTIONS[1], image=image, seed=[3, 4], num_images_per_prompt=2, **settings
    )
    theirs = pair.draw(
        "FluxImg2ImgPipeline",
        CAPTIONS[1],
        [3, 4],
        image=[image, image],
        num_images_per_prompt=2,
        **settings,
    )
    assert worst(ours.images, theirs) >= BAR
    alone = pair.ours.generate(CAPTIONS[1], image=image, seed=4, **settings)
    assert worst(ours.images[1:], alone.images) >= 60


@pytest.mark.parametrize(
    ("picture", "drawn", "strength", "steps"),
    [((48, 64), (48, 64), 0.85, 5), ((50, 38), (32, 48), 1.0, 3)],
)
def test_inpainting_equals_diffusers(
    pair: Pair,
    picture: tuple[int, int],
    drawn: tuple[int, int],
    strength: float,
    steps: int,
) -> None:
    image, mask = scene(*picture, 3), mask_of(*picture)
    settings: dict[str, Any] = {
        "height": drawn[0],
        "width": drawn[1],
        "num_inference_steps": steps,
        "strength": strength,
    }
    prompts = CAPTIONS[:2]
    ours = pair.ours.generate(prompts, image=image, mask=mask, seed=8, **settings)
    theirs = pair.draw(
        "FluxInpaintPipeline", prompts, 8, image=image, mask_image=mask, **settings
    )
    assert worst(ours.images, theirs) >= BAR
    plain = pair.ours.generate(prompts, image=image, seed=8, **settings)
    assert worst(plain.images, theirs) < 40  # the mask has kept something


# What is run, and what is not.


def test_caches_see_the_steps_that_are_run(flux: TextToImagePipeline) -> None:
    settings: dict[str, Any] = {
        "image": scene(32, 32),
        "seed": 1,
        "num_inference_steps": 10,
        "height": 32,
        "width": 32,
    }
    plain = flux.generate(CAPTIONS[0], strength=0.6, **settings)
    cache = TaylorSeerConfig(cache_interval=3, warmup_steps=2)
    cached = flux.generate(CAPTIONS[0], strength=0.6, cache=cache, **settings)
    for report in (plain.report, cached.report):
        assert report.num_inference_steps == 10
        assert (report.num_steps, report.strength) == (6, 0.6)
        assert [record.step for record in report.steps] == [*range(6)]
    assert cached.report.steps[0].sigma == plain.report.steps[0].sigma < 0.8
    actions = [record.actions[0] for record in cached.report.steps]
    assert actions == ["compute", "compute", "predict", "compute", "predict", "predict"]
    exact = StepMaskConfig(compute_steps=(0, 2, 5))
    masked = flux.generate(CAPTIONS[0], strength=0.6, cache=exact, **settings)
    assert masked.report.full_passes == 3
    with pytest.raises(RequestError, match="compute_steps"):
        flux.generate(CAPTIONS[0], strength=0.5, cache=exact, **settings)
    assert len(cached.report.images) == 1


def test_magcache_takes_the_ratios_of_the_steps_that_are_run(
    flux: TextToImagePipeline,
) -> None:
    # Nothing changes in the last four of ten steps, all in those before.
    cache = MagCacheConfig(
        ratios=(*(0.1,) * 6, *(1.0,) * 4), retention_ratio=0.0, max_consecutive_cached=9
    )
    settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 10}
    whole = flux.generate(CAPTIONS[0], cache=cache, **settings)
    assert whole.report.full_passes == 6
    image = scene(32, 32)
    for strength, passes in ((0.4, 1), (0.6, 2), (1.0, 6)):
        some = flux.generate(
            CAPTIONS[0], image=image, strength=strength, cache=cache, **settings
        )
        assert some.report.full_passes == passes


def test_every_cache_draws_within_a_mask(flux: TextToImagePipeline) -> None:
    for row in ROWS:
        result = flux.generate(
            CAPTIONS[0],
            image=scene(32, 32),
            mask=mask_of(32, 32),
            strength=0.8,
            seed=1,
            num_inference_steps=15,
            cache=row.config,
        )
        assert result.report.num_steps == STEPS


def test_text_alone_has_no_encoder(demo: TextToImagePipeline) -> None:
    assert "vae_encoder.encode" not in demo.models
    assert "keep_picture" not in demo.models
    names = {module.name for module in demo.graphs.opened.modules.values()}
    assert "vae_encoder" not in names
    with pytest.raises(RequestError, match="load it with takes_pictures"):
        demo.generate(CAPTIONS[0], image=scene(32, 32))


def test_a_pipeline_compiles_the_encoder_once(flux: TextToImagePipeline) -> None:
    flux.generate(CAPTIONS[0], image=scene(32, 32), num_inference_steps=2)
    count = flux.compile_count
    flux.generate(CAPTIONS[0], image=scene(48, 32), num_inference_steps=2)
    assert flux.compile_count == count
    assert "vae_encoder.encode" in flux.models


@pytest.mark.parametrize(
    ("picture", "asked", "drawn"),
    [
        ((21, 30), {}, (20, 28)),  # rounded down to cells of 4
        ((64, 16), {}, (64, 16)),  # as many pixels as 32 x 32
        ((128, 32), {}, (64, 16)),  # more, so its shape at that many
        ((20, 40), {"width": 20}, (8, 20)),  # one side follows the other
        ((20, 40), {"height": 12, "width": 12}, (12, 12)),
    ],
)
def test_sizes_are_the_pictures(
    flux: TextToImagePipeline,
    picture: tuple[int, int],
    asked: dict[str, Any],
    drawn: tuple[int, int],
) -> None:
    inputs = PictureInputs((Picture(np.asarray(scene(*picture))),))
    request = GenerationRequest(("a",), inputs=inputs, **asked)
    context = flux.create_context(request)
    assert (context.height, context.width) == drawn
    assert context.given is not None
    assert context.given.start is not None
    assert context.given.start.pixels.shape == (1, *drawn, 3)
    sources = {key: context.defaults.get(key) for key in ("height", "width")}
    assert sources == {
        key: None if key in asked else "image" for key in ("height", "width")
    }


def test_a_mask_that_marks_nothing_is_told(flux: TextToImagePipeline) -> None:
    image = np.asarray(scene(32, 32))
    inputs = PictureInputs((Picture(image),), Picture(np.zeros_like(image)))
    context = flux.create_context(GenerationRequest(("a",), inputs=inputs))
    assert any("the mask marks nothing" in text for text in context.warnings)


def test_what_a_model_does_not_take_is_refused(
    flux: TextToImagePipeline, toy: TextToImagePipeline
) -> None:
    image = Picture(np.asarray(scene(32, 32)))
    with pytest.raises(RequestError, match=r"image is no input of .*nothing but text"):
        toy.create_context(GenerationRequest(("a",), inputs=PictureInputs((image,))))
    several = PictureInputs((image, image))
    with pytest.raises(RequestError, match=r"image must be at most 1 .*got 2 pictures"):
        flux.create_context(GenerationRequest(("a",), inputs=several))
    weak = PictureInputs((image,), strength=1e-20)
    with pytest.raises(RequestError, match="strength must leave at least one of 4"):
        flux.create_context(GenerationRequest(("a",), inputs=weak))
    tiny = PictureInputs((Picture(np.zeros((40, 3, 3), np.uint8)),))
    with pytest.raises(RequestError, match="less than 4 pixels a side"):
        flux.create_context(GenerationRequest(("a",), inputs=tiny))


def test_files_without_an_encoder_are_refused_before_anything_compiles(
    flux_folder: Path, tmp_path: Path
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("encoder.")}
    save_file(kept, file)
    image = Picture(np.asarray(scene(32, 32)))
    pipeline = open_model(folder, device="cpu")
    with pytest.raises(RequestError, match="hold a decoder only; take the folder"):
        pipeline.create_context(
            GenerationRequest(("a",), inputs=PictureInputs((image,)))
        )
    with pytest.raises(ModelLoadError, match=r"vae.*missing.*encoder"):
        open_model(folder, device="cpu", takes_pictures=True)


def test_only_models_that_take_pictures_are_loaded_for_them(toy_folder: Path) -> None:
    with pytest.raises(RequestError, match=r"takes_pictures: .* from text alone"):
        open_model(toy_folder, device="cpu", takes_pictures=True)
