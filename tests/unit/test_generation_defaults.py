"""What a folder says that requests take where they leave it open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folders import copy_folder

from max_diffusion import GenerationRequest, ModelLoadError, open_model
from max_diffusion.pipelines.generation_defaults import (
    DEFAULTS_FILE,
    GenerationDefaults,
)


@pytest.fixture
def folder(flux_folder: Path, tmp_path: Path) -> Path:
    return copy_folder(flux_folder, tmp_path / "copy")


def test_a_folder_without_the_file_has_those_of_its_family(folder: Path) -> None:
    assert GenerationDefaults.read(folder) == GenerationDefaults()
    report = open_model(folder, device="cpu").create_context(
        GenerationRequest(prompts=("a heart",))
    )
    assert report.defaults["num_inference_steps"] != DEFAULTS_FILE


def test_requests_that_leave_them_open_take_the_folders(folder: Path) -> None:
    text = json.dumps({"num_inference_steps": 3, "true_cfg_scale": 2})
    (folder / DEFAULTS_FILE).write_text(text)
    pipeline = open_model(folder, device="cpu")
    request = GenerationRequest(prompts=("a heart",), negative_prompt="a star")
    context = pipeline.create_context(request)
    assert (context.num_inference_steps, context.true_cfg_scale) == (3, 2.0)
    for name in ("num_inference_steps", "true_cfg_scale"):
        assert context.defaults[name] == DEFAULTS_FILE
    own = pipeline.create_context(
        GenerationRequest(
            prompts=("a heart",), num_inference_steps=5, true_cfg_scale=1.0
        )
    )
    assert (own.num_inference_steps, own.true_cfg_scale) == (5, 1.0)
    assert not set(own.defaults) & {"num_inference_steps", "true_cfg_scale"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([1], r"may hold num_inference_steps, .* and nothing else, got \[1\]"),
        ({"steps": 4}, "and nothing else, got .*steps"),
        ({"num_inference_steps": 2.0}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": None}, "must be a whole number, got None"),
        ({"true_cfg_scale": -1}, "true_cfg_scale must be a number of 0 or more"),
        ({"true_cfg_scale": True}, "true_cfg_scale must be a number of 0 or more"),
        ({"guidance_scale": 2.0}, "guidance_scale has no effect on a model that is"),
    ],
)
def test_what_does_not_fit_is_told(folder: Path, entries: Any, message: str) -> None:
    (folder / DEFAULTS_FILE).write_text(json.dumps(entries))
    with pytest.raises(ModelLoadError, match=message) as caught:
        open_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_no_json_is_told(folder: Path) -> None:
    (folder / DEFAULTS_FILE).write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_defaults\.json is no JSON"):
        open_model(folder, device="cpu")
