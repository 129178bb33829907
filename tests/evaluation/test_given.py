"""Comparing, tuning and measuring from a picture, and with adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from flux1_editing import as_pipeline
from painters import Painter
from pictures import mask_of, scene
from PIL import Image

from max_diffusion import (
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
    TextToImagePipeline,
    calibrate,
    demo_model_path,
    load_pipeline,
)
from max_diffusion.core.pictures import Picture
from max_diffusion.evaluation import (
    Comparison,
    Target,
    compare,
    save_comparison,
    save_tuning,
    tune,
)
from max_diffusion.evaluation.compare import _fewer
from max_diffusion.evaluation.comparison_report import contact_sheet

PROMPTS = ("a red circle", "two green stars")
STEPS = 10
# The last 6 of 10 steps are run.
STRENGTH = 0.6
SKIPPING = StepMaskConfig(compute_steps=(0, 1, 3, 5))
IMAGE, MASK = scene(64, 96, seed=3), mask_of(64, 96)


@pytest.fixture(scope="module")
def comparison(demo_pictures: TextToImagePipeline) -> Comparison:
    return compare(
        demo_pictures,
        PROMPTS,
        [SKIPPING],
        num_inference_steps=STEPS,
        fewer_steps=(5,),
        image=IMAGE,
        mask=MASK,
        strength=STRENGTH,
        seed=7,
        runs=1,
    )


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = lora_files.matrices(demo_model_path(), "transformer")
    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    return lora_files.write(path, lora_files.lora("kohya", shapes, strength=0.1))


def test_rows_are_what_the_pipeline_draws_from_the_picture(
    demo_pictures: TextToImagePipeline, comparison: Comparison
) -> None:
    runs = {"no cache": 6, comparison.rows[1].label: 6, "5 steps": 3}
    for row in comparison.rows:
        run = runs.pop(row.label, row.reports[0].num_steps)
        for index, prompt in enumerate(PROMPTS):
            wanted = demo_pictures.generate(
                prompt,
                num_inference_steps=row.setting.num_inference_steps,
                image=IMAGE,
                mask=MASK,
                strength=STRENGTH,
                seed=7 + index,
                cache=row.setting.cache,
            )
            assert np.array_equal(row.images[index], wanted.images[0])
            assert row.reports[index].num_steps == run
        assert row.reports[0].total_passes == run
    assert not runs
    assert [row.full_passes for row in comparison.rows[:2]] == [6, 4]


def test_a_control_runs_the_steps_that_take_as_long() -> None:
    # Of 10 steps the last 6, and of those before as diffusers counts them.
    run = [1, 2, 2, 3, 3, 4, 5, 5, 6, 6]
    found = [_fewer(run, share) for share in (0.01, 0.35, 0.5, 0.66, 0.85, 1.0, 7.0)]
    assert found == [1, 3, 5, 6, 8, 10, 10]
    every = list(range(1, 11))
    shares = (0.01, 0.34, 0.55, 0.66, 0.96, 2.0)
    assert [_fewer(every, share) for share in shares] == [1, 3, 6, 7, 10, 10]


def test_rules_of_steps_are_of_those_that_are_run(
    demo_pictures: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = StepMaskConfig(compute_steps=(0, 7))
    given: dict[str, Any] = {"num_inference_steps": STEPS, "runs": 1}
    picture: dict[str, Any] = {"image": IMAGE, "strength": STRENGTH}
    with monkeypatch.context() as patch:
        patch.setattr(TextToImagePipeline, "draw", None)  # it is told before
        with pytest.raises(RequestError, match="names step 7, but the last of 6 is 5"):
            compare(demo_pictures, PROMPTS[0], [late], **given, **picture)
    plain = compare(demo_pictures, PROMPTS[0], [late], **given, height=64, width=64)
    assert plain.rows[1].full_passes == 2


def test_a_comparison_says_what_it_was_drawn_from(
    comparison: Comparison, tmp_path: Path
) -> None:
    plain = comparison.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    mask = comparison.baseline.reports[0].mask
    assert plain["images"] == [Picture(np.asarray(IMAGE)).digest]
    assert (plain["mask"], plain["strength"]) == (mask, STRENGTH)
    assert mask is not None
    assert (plain["width"], plain["height"]) == (96, 64)
    assert "loras" not in plain
    words = (
        "from a picture of 96 x 64 pixels under a mask at strength 0.6, the last 6 of "
        "10 steps"
    )
    assert comparison.given_words == words
    page = save_comparison(comparison, tmp_path)[0].read_text()
    assert f"drawn {words}." in page
    assert "The picture that all was drawn from" in page
    assert "The mask that all was drawn from" in page
    # Beside the columns' names, above the rows', and below some lines of the words.
    corner = np.asarray(contact_sheet(comparison))[44:140, 16:130]
    small = IMAGE.copy()
    small.thumbnail((49, 60), Image.Resampling.LANCZOS)
    wanted = np.asarray(small)
    tops = [
        top
        for top in range(96 - small.height)
        if np.array_equal(corner[top:][: small.height, : small.width], wanted)
    ]
    assert len(tops) == 1
    assert tops[0] >= 16


def test_text_alone_says_nothing_of_pictures() -> None:
    painter: Any = Painter()
    plain = compare(painter, "a", ["auto"], runs=1)
    assert plain.given_words == ""
    assert (
        not {"images", "mask", "strength", "loras", "inputs"} & plain.to_dict().keys()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0.5}, "strength must come with an image"),
        ({"mask": MASK}, "mask must come with an image"),
        ({"image": "no.png"}, "image no.png: there is no such file"),
        ({"image": IMAGE, "strength": 0}, "strength must be above 0"),
        ({"image": [IMAGE, IMAGE]}, "image must be at most 1 for FluxPipeline, got 2"),
        ({"loras": "style"}, "style"),
        ({"loras": ["a", "a"]}, "loras: 'a' is given twice"),
    ],
)
def test_what_cannot_be_started_from_is_told_before_drawing(
    demo_pictures: TextToImagePipeline,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "draw", None)
    for call in (
        lambda: compare(demo_pictures, "a", [SKIPPING], **given),
        lambda: tune(demo_pictures, Target(psnr=30), methods=["auto"], **given),
    ):
        with pytest.raises(RequestError, match=message):
            call()


def test_adapters_change_what_is_compared(lora: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(
        "demo", device="cpu", is_extensible=False, adapters={"style": lora}
    )
    settings: dict[str, Any] = {
        "num_inference_steps": 4,
        "height": 64,
        "width": 64,
        "seed": 2,
    }
    plain, styled = (
        compare(pipeline, PROMPTS[0], [], runs=1, loras=loras, **settings)
        for loras in (None, {"style": 0.8})
    )
    assert not np.array_equal(plain.baseline.images, styled.baseline.images)
    wanted = pipeline.generate(PROMPTS[0], loras={"style": 0.8}, **settings)
    assert np.array_equal(styled.baseline.images, wanted.images)
    assert styled.to_dict()["loras"] == {"style": 0.8}
    assert styled.given_words == "with LoRA style:0.8"
    assert "drawn with LoRA style:0.8." in (
        save_comparison(styled, tmp_path)[0].read_text()
    )


def test_tuning_draws_and_validates_from_the_picture(
    demo_pictures: TextToImagePipeline, tmp_path: Path
) -> None:
    path = tmp_path / "scene.png"
    IMAGE.save(path)

    def forget(share: float, what: str) -> None:
        path.unlink(missing_ok=True)  # it is read once, before all of it

    result = tune(
        demo_pictures,
        Target(psnr=20),
        prompts=PROMPTS[:1],
        validation_prompts=PROMPTS[1:],
        methods=["taylorseer"],
        budget_seconds=0.3,
        num_inference_steps=STEPS,
        image=path,
        strength=STRENGTH,
        seed=4,
        on_progress=forget,
    )
    assert not path.exists()
    found = result.validation
    assert (found.strength, found.inputs and found.inputs.images) == (
        STRENGTH,
        (Picture(np.asarray(IMAGE)),),
    )
    wanted = demo_pictures.generate(
        PROMPTS[1],
        image=IMAGE,
        strength=STRENGTH,
        seed=5,
        num_inference_steps=STEPS,
        cache=result.winner.cache,
    )
    assert isinstance(result.winner.cache, TaylorSeerConfig)
    assert np.array_equal(found.rows[1].images, wanted.images)
    files = save_tuning(result, tmp_path)
    drawn = json.loads(files[0].read_text())["tuning"]["drawn"]
    assert drawn == found.given_words
    assert "strength 0.6, the last 6 of 10 steps" in drawn
    assert f"drawn {drawn}." in files[1].read_text()


# Measuring.


@pytest.fixture(scope="module")
def measurable(
    lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> TextToImagePipeline:
    """The demo model as a FLUX.1-Kontext, with the graphs that measuring takes."""
    target = tmp_path_factory.mktemp("kontext") / "model"
    folder = as_pipeline(demo_model_path(), target, "FluxKontextPipeline")
    return load_pipeline(
        folder,
        device="cpu",
        caches=("none", "magcache"),
        is_extensible=False,
        takes_pictures=True,
        adapters={"style": lora},
    )


def test_references_and_adapters_are_measured(measurable: TextToImagePipeline) -> None:
    settings: dict[str, Any] = {
        "num_inference_steps": 4,
        "height": 64,
        "width": 64,
        "options": {"auto_resize": False},
    }
    picture: dict[str, Any] = {"image": IMAGE}
    with pytest.raises(RequestError, match="auto_resize is of a reference picture"):
        calibrate(measurable, PROMPTS[0], **settings)
    edited = calibrate(measurable, PROMPTS[0], **settings, **picture)
    del settings["options"]
    plain = calibrate(measurable, PROMPTS[0], **settings)
    styled = calibrate(measurable, PROMPTS[0], **settings, loras="style")
    ratios = {each.magcache_ratios for each in (edited, plain, styled)}
    assert len(ratios) == 3
    assert all(len(each) == 4 for each in ratios)


@pytest.mark.parametrize("strength", [None, 0.9])
def test_a_part_of_a_run_is_not_measured(
    flux: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch, strength: float | None
) -> None:
    monkeypatch.setattr(TextToImagePipeline, "execute", None)
    with pytest.raises(
        RequestError, match=f"must be 1, got {strength or 0.6}, as"
    ) as e:
        calibrate(flux, "heart", image=IMAGE, strength=strength)
    assert len(str(e.value).splitlines()) == 1
