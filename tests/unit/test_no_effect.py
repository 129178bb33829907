"""What a request sets and a model does not use is refused or warned of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_video
from flux1_editing import as_pipeline
from folders import TEST_GRAPHS, copy_folder
from reports import make_report
from single_files import as_bfl, saved, tensors_of

from max_diffusion import (
    GenerationRequest,
    RequestError,
    TextToImagePipeline,
    open_model,
)
from max_diffusion.caches import CACHES, CALIBRATION_FILE, Calibration, MagCacheConfig
from max_diffusion.cli.main import main
from max_diffusion.core.options import declared_options
from max_diffusion.media.metadata import text_chunks
from max_diffusion.media.writers import save_frames
from max_diffusion.models.cogvideox.pipeline import CogVideoXOptions, CogVideoXPipeline
from max_diffusion.models.flux1.pipeline import Flux1Pipeline
from max_diffusion.models.z_image.pipeline import ZImagePipeline
from max_diffusion.pipelines.inspection import inspect
from max_diffusion.pipelines.opening import demo_model_path
from max_diffusion.serving.http.schemas import ImageGenerationRequest


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextToImagePipeline]:
    with toy_video.registered():
        yield open_model(toy_video.write_folder(tmp_path_factory.mktemp("toy")), "cpu")


def request(**settings: Any) -> GenerationRequest:
    settings.setdefault("prompts", ("gray 90",))
    return GenerationRequest(seed=1, **settings)


@pytest.mark.parametrize("adapters", [None, {}])
def test_a_limit_for_loras_without_any_is_refused(adapters: Any) -> None:
    with pytest.raises(RequestError) as caught:
        open_model("demo", "cpu", adapters=adapters, adapter_memory_limit=2**30)
    assert str(caught.value) == (
        "adapter_memory_limit: has no effect without adapters; leave it out, or name "
        "files"
    )


def test_a_size_that_an_area_outweighs_is_warned_of(tmp_path: Path) -> None:
    source = demo_model_path()
    folder = as_pipeline(source, tmp_path / "model", "FluxKontextPipeline")
    kontext = open_model(folder, "cpu")
    for settings, said in (
        (
            {"width": 64, "height": 16, "options": {"max_area": 4096}},
            "128 x 32 pixels are drawn, not the width of 64 and height of 16 that the "
            "request names: max_area scales these; leave it out to draw them as they "
            "are",
        ),
        (
            {"height": 256, "options": {"max_area": 4096}},
            "32 x 80 pixels are drawn, not the height of 256 that the request names: "
            "max_area scales these; leave it out to draw them as they are",
        ),
        ({"width": 64, "height": 64, "options": {"max_area": 4096}}, None),
        ({"options": {"max_area": 4096}}, None),
        ({"width": 64, "height": 16}, None),
    ):
        warnings = kontext.create_context(request(**settings)).warnings
        assert warnings == (() if said is None else (said,))


@pytest.mark.parametrize("name", ["prompt_2", "negative_prompt_2"])
@pytest.mark.parametrize("given", ["a star", ("a star",)])
def test_texts_that_no_encoder_reads_are_refused(
    pipeline: TextToImagePipeline, name: str, given: Any
) -> None:
    with pytest.raises(RequestError) as caught:
        pipeline.create_context(request(**{name: given}))
    assert str(caught.value) == (
        f"request: {name} is what a second text encoder reads instead, and "
        "ToyVideoPipeline has none that does; leave it out"
    )
    pipeline.create_context(request(**{name: ""}))  # the first again


def test_a_picture_s_second_texts_are_left_out_where_none_reads_them(
    pipeline: TextToImagePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: dict[str, Any] = {
        "prompts": ("gray 90",),
        "prompt_2": "a star",
        "negative_prompt": "gray 3",
        "negative_prompt_2": "dull",
        "true_cfg_scale": 2.0,
    }
    frames, file = np.zeros((1, 4, 6, 3), np.uint8), tmp_path / "x.png"
    save_frames(file, frames, text_chunks(make_report(**told), 0))
    folder = pipeline.pipeline_config.path
    words = ["generate", "--like", str(file), "--model", str(folder), "--steps", "3"]
    words += ["--cache", "none", "--height", "4", "--width", "6", "--device", "cpu"]
    words += ["--precompiled", str(TEST_GRAPHS / "toy"), "--num-frames", "1"]
    output = ["--output", str(tmp_path / "y.png")]
    with pytest.raises(SystemExit, match="0"):
        main([*words, *output])
    errors = capsys.readouterr().err
    for name, text in (("prompt_2", "a star"), ("negative_prompt_2", "dull")):
        said = f"warning: {file}: drawn with {name} {text!r}, which this model does not"
        assert said in errors
    with pytest.raises(SystemExit, match="2"):
        main([*words, *output, "--prompt-2", "a"])
    assert "prompt_2 is what a second text encoder reads" in capsys.readouterr().err


def test_families_say_whether_they_read_a_second_text() -> None:
    assert Flux1Pipeline.has_second_text
    assert not CogVideoXPipeline.has_second_text
    assert not ZImagePipeline.has_second_text


GUIDED = {"true_cfg_scale": 2.0, "negative_prompt": "gray 3"}


@pytest.mark.parametrize(
    ("settings", "options", "notes"),
    [
        ({}, {"fps": 12.0}, []),
        ({}, {"num_frames": 1}, []),
        ({}, {"is_even": False}, []),
        (GUIDED, {"is_even": True}, []),
        (
            {},
            {"is_even": True},
            ["is_even has no effect without true guidance, which is off; leave it out"],
        ),
        (
            {},
            {"num_frames": 1, "fps": 12.0},
            [
                "fps has no effect without several frames, and one is drawn; leave it "
                "out"
            ],
        ),
    ],
)
def test_options_that_lack_what_they_need_are_warned_of(
    pipeline: TextToImagePipeline,
    settings: dict[str, Any],
    options: dict[str, Any],
    notes: list[str],
) -> None:
    context = pipeline.create_context(request(options=options, **settings))
    assert list(context.warnings) == notes


def test_what_options_of_cogvideox_need() -> None:
    found = declared_options(CogVideoXOptions)
    assert {name: declared.needs for name, declared in found.items()} == {
        "num_frames": None,
        "fps": "frames",
        "use_dynamic_cfg": "guidance",
    }


def test_a_folder_s_measurements_are_of_its_own_transformer(
    flux_folder: Path, tmp_path: Path
) -> None:
    file = saved(tmp_path / "flux", as_bfl(tensors_of(flux_folder, "transformer")))
    folder = copy_folder(flux_folder, tmp_path / "model")
    ratios = tuple(np.linspace(0.9, 1.0, 20).tolist())
    Calibration(magcache_ratios=ratios).write(folder / CALIBRATION_FILE)
    asked = request(cache=MagCacheConfig(), num_inference_steps=4)
    open_model(folder, "cpu", caches=tuple(CACHES)).create_context(asked)
    other = open_model(folder, "cpu", transformer=file, caches=tuple(CACHES))
    with pytest.raises(RequestError, match="magcache: no ratios were measured"):
        other.create_context(asked)
    given = open_model(
        *(folder, "cpu"),
        transformer=file,
        calibration=folder / CALIBRATION_FILE,
        caches=tuple(CACHES),
    )
    given.create_context(asked)


def test_help_tells_no_number_of_one_family_as_every_model_s(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "denoising steps; default: the model's " in said
    assert "28 or 4" not in said
    assert "needs --true-cfg above 1" not in said
    fields = ImageGenerationRequest.model_fields
    for name in ("steps", "true_cfg"):
        assert "the model's if left out" in (fields[name].description or "")


def test_what_is_inspected_is_what_requests_have_by_default(
    pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kind = str(pipeline.pipeline_config.path), toy_video.ToyVideoPipeline
    plain = inspect(folder, device="cpu")
    assert (plain.branches, plain.num_frames, plain.image_tokens) == (1, 3, 18)
    monkeypatch.setattr(kind, "default_true_cfg_scale", 4.0)
    assert inspect(folder, device="cpu").branches == 1  # nothing to guide away from
    monkeypatch.setattr(kind, "default_negative_prompt", "gray 0")
    guided = inspect(folder, device="cpu")
    for report, true_guidance in ((guided, True), (plain, False)):
        asked = inspect(folder, device="cpu", true_guidance=true_guidance)
        # What is free is asked of the system each time, and differs.
        assert replace(asked, memory=report.memory) == report
    of = [each.caches["taylorseer"].state_bytes for each in (plain, guided)]
    assert of[1] == 2 * of[0] > 0
    longer = inspect(folder, device="cpu", options={"num_frames": 6})
    assert (longer.num_frames, longer.image_tokens) == (6, 36)
    with pytest.raises(RequestError, match="request: num_frames must be at most 9"):
        inspect(folder, device="cpu", options={"num_frames": 10})


def test_options_of_some_models_are_taken_where_it_is_inspected(
    pipeline: TextToImagePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(pipeline.pipeline_config.path), "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--num-frames", "6", "--true-guidance"])
    said = " ".join(capsys.readouterr().out.split())
    assert "state of 1 videos of 6 frames of 36 image and 1 text tokens, with" in said
