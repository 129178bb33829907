"""FLUX.1-Fill: a picture and its mask as channels, against diffusers' pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_rows import ROWS
from engines import Recorder
from flux1_editing import Twins, as_pipeline, latents_of, make_fill_folder
from folders import CAPTIONS, TEST_GRAPHS
from pictures import mask_of, scene, worst

from max_diffusion import (
    CACHES,
    GenerationRequest,
    ModelLoadError,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
    calibrate,
    load_pipeline,
    open_model,
)
from max_diffusion.core.pictures import Picture, PictureInputs
from max_diffusion.engine import Engine, EngineConfig
from max_diffusion.evaluation import compare

BAR = 60.0
"""Decibels of every picture against diffusers'."""


@pytest.fixture(scope="module")
def fill_folder(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fill_folder(flux_folder, tmp_path_factory.mktemp("fill") / "model")


@pytest.fixture(scope="module")
def fill(fill_folder: Path) -> TextToImagePipeline:
    """Pictures are not asked for: every request of such a model brings some."""
    return load_pipeline(
        fill_folder,
        device="cpu",
        caches=(*CACHES, TaylorSeerConfig(target="modules")),
        precompiled=[TEST_GRAPHS / "float32"],
        is_extensible=False,
    )


@pytest.fixture(scope="module")
def twins(fill: TextToImagePipeline) -> Twins:
    return Twins.of(fill)


def test_filling_is_compared_and_measured(fill: TextToImagePipeline) -> None:
    picture: dict[str, Any] = {"image": scene(32, 48, 2), "mask": mask_of(32, 48)}
    settings: dict[str, Any] = {"num_inference_steps": 4, "seed": 3, **picture}
    found = compare(fill, CAPTIONS[0], ["first-block"], runs=1, **settings)
    for row in found.rows[:2]:
        wanted = fill.generate(CAPTIONS[0], cache=row.setting.cache, **settings)
        assert np.array_equal(row.images, wanted.images)
    assert found.strength == 1.0
    assert (found.height, found.width) == found.baseline.images.shape[1:3] == (24, 36)
    assert found.given_words == (
        "from a picture of 48 x 32 pixels under a mask at strength 1"
    )
    measured = [
        calibrate(fill, CAPTIONS[0], **{**settings, "image": scene(32, 48, seed)})
        for seed in (2, 4)
    ]
    assert measured[0].magcache_ratios != measured[1].magcache_ratios
    assert [len(each.magcache_ratios) for each in measured] == [4, 4]
    with pytest.raises(RequestError, match=r"must be 1, got 0\.5, as asked for"):
        calibrate(fill, CAPTIONS[0], strength=0.5, **settings)
    with pytest.raises(RequestError, match="there is no image and no mask; give it"):
        calibrate(fill, CAPTIONS[0], num_inference_steps=4)


def inputs_of(height: int, width: int, seed: int = 0) -> PictureInputs:
    image, mask = scene(height, width, seed), mask_of(height, width)
    return PictureInputs((Picture(np.asarray(image)),), Picture(np.asarray(mask)))


@pytest.mark.parametrize(
    ("picture", "drawn", "strength", "steps"),
    [
        ((48, 64), (48, 64), None, 4),
        ((50, 38), (32, 48), 1.0, 3),
        ((33, 97), (48, 32), 0.55, 7),
    ],
)
def test_a_filled_picture_equals_diffusers(
    twins: Twins,
    picture: tuple[int, int],
    drawn: tuple[int, int],
    strength: float | None,
    steps: int,
) -> None:
    image, mask = scene(*picture, 3), mask_of(*picture)
    settings: dict[str, Any] = {"height": drawn[0], "width": drawn[1]}
    settings["num_inference_steps"] = steps
    if strength is not None:
        settings["strength"] = strength
    prompts = CAPTIONS[:2]
    ours = twins.ours.generate(prompts, image=image, mask=mask, seed=8, **settings)
    theirs = twins.draw(prompts, 8, image=image, mask_image=mask, **settings)
    assert worst(ours.images, theirs) >= BAR
    assert ours.report.guidance_scale == 30
    assert ours.report.strength == (strength or 1)


def test_latents_equal_diffusers(twins: Twins) -> None:
    """Where a picture's 8 bits would hide a difference; each input has its part."""
    settings: dict[str, Any] = {"height": 48, "width": 32, "num_inference_steps": 3}
    settings["guidance_scale"] = 4.0
    image, mask = scene(48, 32, 6), mask_of(48, 32)
    theirs = twins.draw(
        CAPTIONS[0], 6, image=image, mask_image=mask, output_type="latent", **settings
    )
    inputs = inputs_of(48, 32, seed=6)
    request = GenerationRequest((CAPTIONS[0],), seed=6, inputs=inputs, **settings)
    limit = 2e-5 * np.abs(theirs).max()
    assert np.abs(latents_of(twins.ours, request) - theirs).max() <= limit
    turned = Picture(np.asarray(mask)[::-1], "mask")
    for other in (
        PictureInputs(inputs.images, turned),
        PictureInputs(inputs_of(48, 32, seed=7).images, inputs.mask),
    ):
        request = GenerationRequest((CAPTIONS[0],), seed=6, inputs=other, **settings)
        assert np.abs(latents_of(twins.ours, request) - theirs).max() > 100 * limit


def test_a_seed_a_picture_is_the_picture_alone(twins: Twins) -> None:
    """diffusers draws so where it is given the picture once for each generator."""
    image, mask = scene(32, 32, 2), mask_of(32, 32)
    settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3}
    settings["strength"] = 0.7
    ours = twins.ours.generate(
        CAPTIONS[1],
        image=image,
        mask=mask,
        seed=[3, 4],
        num_images_per_prompt=2,
        **settings,
    )
    theirs = twins.draw(
        CAPTIONS[1],
        [3, 4],
        image=[image, image],
        mask_image=mask,
        num_images_per_prompt=2,
        **settings,
    )
    assert worst(ours.images, theirs) >= BAR
    alone = twins.ours.generate(CAPTIONS[1], image=image, mask=mask, seed=4, **settings)
    assert worst(ours.images[1:], alone.images) >= BAR


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_cache_fills(fill: TextToImagePipeline, row: Any) -> None:
    settings: dict[str, Any] = {
        "image": scene(24, 32),
        "mask": mask_of(24, 32),
        "num_inference_steps": 12,
        "seed": 1,
    }
    result = fill.generate(CAPTIONS[0], cache=row.config, **settings)
    actions = [record.actions[0] for record in result.report.steps]
    if row.computed is not None:
        computed = tuple(i for i, each in enumerate(actions) if each == "compute")
        assert computed == row.computed
    if row.off is not None:
        plain = fill.generate(CAPTIONS[0], **settings)
        off = fill.generate(CAPTIONS[0], cache=row.off, **settings)
        assert worst(off.images, plain.images) >= BAR


def test_true_guidance_sees_the_picture_too(fill: TextToImagePipeline) -> None:
    """diffusers' pipeline has none; of one text in both branches it does nothing."""
    settings: dict[str, Any] = {"image": scene(24, 32), "mask": mask_of(24, 32)}
    settings |= {"num_inference_steps": 3, "seed": 1}
    plain = fill.generate(CAPTIONS[0], **settings)
    same = fill.generate(
        CAPTIONS[0], negative_prompt=CAPTIONS[0], true_cfg_scale=3.0, **settings
    )
    other = fill.generate(
        CAPTIONS[0], negative_prompt=CAPTIONS[1], true_cfg_scale=9.0, **settings
    )
    assert worst(same.images, plain.images) >= BAR > worst(other.images, plain.images)


def test_requests_of_other_pictures_run_as_one(fill: TextToImagePipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 4}
    requests = [
        GenerationRequest(
            (CAPTIONS[0],), seed=seed, inputs=inputs_of(24, 32, seed=seed), **settings
        )
        for seed in range(3)
    ]
    recorder = Recorder()
    config = EngineConfig(max_batch=8, max_step_samples=8)
    with Engine(fill, config, observer=recorder) as engine:
        handles = [engine.submit(request) for request in requests]
        results = [handle.result(60) for handle in handles]
    for request, result in zip(requests, results, strict=True):
        assert worst(result.images, fill.draw(request).images) >= BAR
    batches = [size for turn in recorder.turns for _, size in turn.batches]
    assert max(batches) > 1


def test_what_it_does_not_take_is_refused(fill: TextToImagePipeline) -> None:
    inputs = inputs_of(32, 32)
    [image], mask = inputs.images, inputs.mask
    assert mask is not None
    for given, said in (
        (
            None,
            "FluxFillPipeline draws from image and mask, .* no image and no mask",
        ),
        (PictureInputs((image,)), "draws from image and mask, and there is no mask"),
        (PictureInputs((image,), strength=0.5), "there is no mask; give it"),
        (PictureInputs((image, image), mask), "image must be at most 1 .*got 2 pictur"),
        (
            PictureInputs((image,), mask, 1e-20),
            "strength must leave at least one of 50",
        ),
    ):
        with pytest.raises(RequestError, match=said) as caught:
            fill.create_context(GenerationRequest(("a",), inputs=given))
        assert "\n" not in str(caught.value)
    context = fill.create_context(
        GenerationRequest(
            ("a",), inputs=PictureInputs((image,), Picture(np.zeros_like(image.pixels)))
        )
    )
    assert any("the mask marks nothing" in text for text in context.warnings)


def test_folders_of_the_wrong_name_are_refused(
    flux_folder: Path, fill_folder: Path, tmp_path: Path
) -> None:
    as_plain = as_pipeline(fill_folder, tmp_path / "plain", "FluxPipeline")
    as_fill = as_pipeline(flux_folder, tmp_path / "fill", "FluxFillPipeline")
    as_kontext = as_pipeline(fill_folder, tmp_path / "kontext", "FluxKontextPipeline")
    for folder, said in (
        (as_plain, r"takes 56 channels and gives 20, .*Flux1Pipeline takes 4 \* 5 and"),
        (as_fill, r"takes 20 channels and gives 20, .*takes 4 \* 5 \+ 36 and gives"),
        (as_kontext, r"Flux1KontextPipeline takes 4 \* 5 and gives .*model_index.json"),
    ):
        with pytest.raises(ModelLoadError, match=said):
            open_model(folder, device="cpu")


def test_a_transformer_that_gives_other_channels_is_refused(
    fill_folder: Path, tmp_path: Path
) -> None:
    folder = as_pipeline(fill_folder, tmp_path / "model", "FluxFillPipeline")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"out_channels": None}))
    with pytest.raises(ModelLoadError, match="takes 56 channels and gives 56"):
        open_model(folder, device="cpu")
