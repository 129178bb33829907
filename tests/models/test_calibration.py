"""Measuring a model, telling what it can do, and refusing what would not fit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lora_files
import numpy as np
import pytest
import torch
from diffusers.hooks.mag_cache import MagCacheConfig as TheirMagCache
from folders import TEST_GRAPHS
from max.driver import Buffer

from max_diffusion import (
    DenoisingCacheConfig,
    FirstBlockConfig,
    GenerationRequest,
    Grid,
    MagCacheConfig,
    MaxDiffusionError,
    ModelLoadError,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
    calibrate,
    load_pipeline,
    open_model,
)
from max_diffusion.caches import CALIBRATION_FILE, Calibration
from max_diffusion.denoising import Branch
from max_diffusion.pipelines.inspection import inspect
from max_diffusion.sampling import Schedule

if TYPE_CHECKING:
    from diffusers import FluxPipeline

PROMPTS = ("a red circle", "two green stars")


def test_ratios_equal_those_that_diffusers_measures(
    flux: TextToImagePipeline,
    reference: FluxPipeline,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours = calibrate(
        flux, PROMPTS[:1], num_inference_steps=9, seed=4, height=24, width=24
    )
    transformer = reference.transformer
    config = TheirMagCache(num_inference_steps=9, calibrate=True)
    transformer.enable_cache(config)
    try:
        reference(
            PROMPTS[0],
            generator=torch.Generator("cpu").manual_seed(4),
            max_sequence_length=reference.tokenizer_2.model_max_length,
            num_inference_steps=9,
            height=24,
            width=24,
            output_type="latent",
        )
    finally:
        transformer.disable_cache()
    printed = re.search(r"^\[([-\d., e]+)\]$", capsys.readouterr().out, re.MULTILINE)
    assert printed is not None
    theirs = [float(ratio) for ratio in printed[1].split(",")]
    assert len(ours.magcache_ratios) == len(theirs) == 9
    assert np.allclose(ours.magcache_ratios, theirs, atol=2e-5)
    assert theirs[0] == 1
    assert np.ptp(theirs[1:]) > 1e-3


def test_one_prompt_may_be_text(
    flux: TextToImagePipeline,
) -> None:
    measured = calibrate(flux, "heart", num_inference_steps=6)
    assert measured.num_images == 1
    assert len(measured.magcache_ratios) == 6
    usual = calibrate(flux, "heart", height=16, width=16)
    assert usual.num_inference_steps == len(usual.magcache_ratios) == 4  # the model's


def test_prompts_are_averaged_and_the_fit_is_of_all(flux: TextToImagePipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 6}
    each = [
        calibrate(flux, [prompt], seed=seed, **settings)
        for seed, prompt in enumerate(PROMPTS)
    ]
    done: list[tuple[int, int]] = []
    both = calibrate(flux, PROMPTS, on_step=lambda *x: done.append(x), **settings)
    mean = np.mean([one.magcache_ratios for one in each], axis=0)
    assert np.allclose(both.magcache_ratios, mean, atol=1e-12)
    assert done == [(step, 12) for step in range(1, 13)]
    assert (both.num_images, both.num_inference_steps) == (2, 6)
    assert 1 <= len(both.teacache_coefficients) <= 5
    assert both.teacache_range[0] < both.teacache_range[1]
    assert both.teacache_r2 <= 1


def test_a_measured_model_needs_no_ratios(
    flux: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match="no ratios were measured of this model"):
        flux.generate("heart", num_inference_steps=4, cache="magcache")
    measured = Calibration(magcache_ratios=(1.0,))
    monkeypatch.setattr(flux.caches, "_calibration", measured)
    result = flux.generate("heart", num_inference_steps=10, cache="magcache")
    assert result.report.full_passes == 4  # 0, 1, then one in four
    plain = MagCacheConfig(ratios=(1.0,))
    again = flux.generate(
        "heart", seed=result.report.seed, num_inference_steps=10, cache=plain
    )
    assert np.array_equal(again.images, result.images)


def style_and_ink(model: Path, folder: Path) -> tuple[Path, Path]:
    """Two LoRAs of a model's transformer, named in two ways."""
    shapes = lora_files.matrices(model, "transformer")
    style, ink = (
        lora_files.write(folder / f"{name}.safetensors", lora_files.lora(way, shapes))
        for name, way in (("style", "peft"), ("ink", "kohya"))
    )
    return style, ink


def test_measurements_of_other_loras_are_said(
    flux_folder: Path, tmp_path: Path
) -> None:
    style, ink = style_and_ink(flux_folder, tmp_path)
    own = flux_folder / CALIBRATION_FILE
    assert not own.exists()
    plain = Calibration(magcache_ratios=(1.0, 0.9))
    styled = replace(plain, loras=(("style.safetensors", 0.8),))

    def said(
        calibration: Calibration, cache: Any = "magcache", chosen: Any = (), **at: Any
    ) -> tuple[str, ...]:
        pipeline = open_model(
            flux_folder, "cpu", calibration=calibration, adapters={"i": ink}, **at
        )
        config = pipeline.caches.given(cache)
        request = GenerationRequest(
            ("a",), num_inference_steps=4, cache=config, loras=chosen
        )
        return pipeline.create_context(request).warnings

    merged = {"loras": {style: 0.8}}
    how = (
        "measure anew by max-diffusion calibrate --lora FILE:WEIGHT --output FILE, and "
        "load the model with that file as calibration"
    )
    assert said(plain) == said(styled, **merged) == ()
    assert said(plain, **merged) == (
        "magcache decides by what was measured without LoRAs, and this is with "
        f"style.safetensors:0.8; {how}",
    )
    assert said(plain, chosen=(("i", 0.5),)) == (
        "magcache decides by what was measured without LoRAs, and this is with "
        f"ink.safetensors:0.5; {how}",
    )
    assert said(styled, chosen=(("i", 0.5),), **merged) == (
        "magcache decides by what was measured with style.safetensors:0.8, and this is "
        f"with ink.safetensors:0.5, style.safetensors:0.8; {how}",
    )
    assert said(styled, chosen=(("i", 0.0),)) == (
        "magcache decides by what was measured with style.safetensors:0.8, and this is "
        "without LoRAs; measure anew by max-diffusion calibrate, and load the model "
        "with that file as calibration",
    )
    # What decides by itself, and ratios that are given, are of no measurement.
    for cache in ("none", "first-block", MagCacheConfig(ratios=(1.0,))):
        assert said(plain, cache, **merged) == ()


def test_what_was_measured_says_with_which_loras(
    flux_folder: Path, tmp_path: Path
) -> None:
    style, ink = style_and_ink(flux_folder, tmp_path)
    pipeline = load_pipeline(
        flux_folder,
        device="cpu",
        caches=("none", "magcache"),
        precompiled=[TEST_GRAPHS / "float32"],
        loras={str(style): 0.8},
        adapters={"i": ink},
    )
    merged = ("style.safetensors", 0.8)
    measured = calibrate(pipeline, "heart", num_inference_steps=3)
    assert measured.loras == (merged,)
    chosen = calibrate(pipeline, "heart", num_inference_steps=3, loras={"i": 0.5})
    assert chosen.loras == (("ink.safetensors", 0.5), merged)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": "24"}, "height must be a whole number, got '24'"),
        ({"height": 2**15}, "height must be at most"),
        ({"width": 25}, "width must be a multiple"),
        ({"batch": 10**20}, "batch must be at most"),
    ],
)
def test_what_cannot_be_inspected_is_told(
    flux_folder: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        inspect(flux_folder, **arguments)


def test_inspect_tells_weights_that_do_not_fit(
    flux_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(flux_folder, tmp_path / "flux")
    path = tmp_path / "flux" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_layers": 7}))
    with pytest.raises(ModelLoadError, match="missing"):
        inspect(tmp_path / "flux")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": 5}, "at least one prompt, got 5"),
        ({"seed": None}, "seed"),
        ({"num_inference_steps": 1}, "must be at least 2"),
        ({"height": 25}, "must be a multiple"),
    ],
)
def test_what_cannot_be_measured_is_told(
    flux: TextToImagePipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        calibrate(flux, **arguments)


# What a model can do.


def test_a_model_is_told_from_its_files(flux: TextToImagePipeline) -> None:
    folder = flux.pipeline_config.path
    assert folder is not None
    compiled = flux.graphs._compiled
    assert compiled is not None
    report = inspect(folder, height=24, width=32, batch=2, true_guidance=True)
    for name, part in report.components.items():
        files = (folder / name).glob("*.safetensors")
        size = sum(file.stat().st_size for file in files)
        assert 0 < size - part.stored_bytes < 50_000  # the header
        assert part.stored_bytes == 4 * part.parameters
        loaded = sum(
            array.nbytes
            for key, array in compiled._weights.items()
            if key.startswith(f"{name}.")
        )
        assert part.used_bytes == loaded
    assert (report.image_tokens, report.text_tokens) == (48, 32)
    supported = {name for name, c in report.caches.items() if c.is_supported}
    assert set(report.caches) - supported == {"magcache", "teacache"}
    assert "run max-diffusion calibrate" in report.caches["magcache"].reason
    run = flux.generate(
        PROMPTS,
        height=24,
        width=32,
        negative_prompt="a",
        true_cfg_scale=2,
        num_inference_steps=12,
        cache=TaylorSeerConfig(),
    )
    assert report.caches["taylorseer"].state_bytes == run.report.cache_bytes
    assert report.to_dict()["caches"]["pab"]["options"]["interval"] == 2


def test_too_many_blocks_that_always_run_are_refused(flux: TextToImagePipeline) -> None:
    cache = FirstBlockConfig(front_blocks=2, back_blocks=2)
    with pytest.raises(RequestError, match="4 blocks would always run, but this"):
        flux.generate("a", num_inference_steps=2, cache=cache)


def test_a_cache_beyond_the_memory_limit_is_refused(flux: TextToImagePipeline) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 12, "cache": "first-block"}
    held = flux.generate("a", **settings).report.cache_bytes
    flux.generate("a", **settings, cache_memory_limit=held)
    with pytest.raises(
        RequestError,
        match=rf"keep {held} bytes .* limit of {held - 1}; .*and fit: none, tay",
    ) as caught:
        flux.generate("a", **settings, cache_memory_limit=held - 1)
    assert "magcache" not in str(caught.value)  # it would fit, but has no ratios
    size = np.int64(24)
    flux.generate("a", height=size, **settings, cache_memory_limit=10**9)  # type: ignore[arg-type]


def test_a_default_cache_that_cannot_run_is_told_before_compiling(
    flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("max_diffusion.execution.compiler.CompiledGraphs.add", None)
    for cache, message in (
        (FirstBlockConfig(front_blocks=9), "none could be reused"),
        ("magcache", "no ratios were measured"),
    ):
        with pytest.raises(RequestError, match=message):
            load_pipeline(flux_folder, device="cpu", cache=cache)


@pytest.mark.parametrize(
    "caches", ["none", None, (5,), (TaylorSeerConfig,), (DenoisingCacheConfig(),)]
)
def test_caches_that_are_none_are_told(caches: Any) -> None:
    with pytest.raises(RequestError, match="caches: expected"):
        load_pipeline("demo", caches=caches)


def test_a_request_with_a_name_for_a_cache_is_told(flux: TextToImagePipeline) -> None:
    request = GenerationRequest(prompts=("a",), cache=cast(Any, "pab"))
    with pytest.raises(RequestError, match="expected a cache configuration such as"):
        flux.create_context(request)


def test_branches_and_grid_are_checked(flux: TextToImagePipeline) -> None:
    latents = Buffer.from_numpy(np.zeros((1, 6, 20), np.float32))
    schedule = Schedule(np.array([1.0, 0], np.float32), np.array([999.0], np.float32))
    branch = Branch("conditional", {})
    with pytest.raises(MaxDiffusionError, match="got 3 branches"):
        flux.denoise(latents, schedule, [branch] * 3)
    with pytest.raises(MaxDiffusionError, match=r"as many cells .* 6, got Grid"):
        flux.denoise(latents, schedule, [branch], grid=Grid(1, 5, 5))


def test_a_calibration_that_is_not_there_is_told(flux_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot read .*nothing\.json"):
        load_pipeline(flux_folder, calibration="nothing.json")


def test_the_demo_model_is_measured() -> None:
    report = inspect("demo")
    assert report.caches["magcache"].is_supported
    assert CALIBRATION_FILE == "cache_calibration.json"
