"""Pictures repeated by what they say of themselves: ``generate --like``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import parse, run
from pictures import open_png
from PIL import Image
from reports import make_report

from max_diffusion import (
    NoCacheConfig,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
)
from max_diffusion.media.metadata import text_chunks
from max_diffusion.media.writers import save_frames


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def pictures(
    demo: TextToImagePipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two prompts, two pictures each, and the same as WebP and JPEG."""
    folder = tmp_path_factory.mktemp("pictures")
    for suffix in ("png", "webp", "jpg"):
        done = run(
            *("a red circle \U0001f600", 'zwei \u2605: "x", y', "--num-images", 2),
            *("--seed", 2**33 + 1, "--steps", 6, "--width", 96, "--true-cfg", 2),
            *("--negative-prompt", "dull: grey, \u65e5\u672c", "--guidance", 2.5),
            *("--cache", "taylorseer", "--cache-option", "warmup_steps=2"),
            *("--output", folder / f"x.{suffix}", "--dtype", "float32"),
        )
        assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.parametrize(
    ("name", "index"), [("x-1.png", 1), ("x-4.png", 4), ("x-3.webp", 3), ("x-2.jpg", 2)]
)
def test_a_picture_is_repeated_to_the_bit(
    pictures: Path, tmp_path: Path, name: str, index: int
) -> None:
    done = run("--like", pictures / name, "--output", tmp_path / "y.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path / 'y.png'}: seed {2**33 + 1}, ")
    assert [path.name for path in tmp_path.iterdir()] == ["y.png"]
    assert np.array_equal(
        pixels(tmp_path / "y.png"), pixels(pictures / f"x-{index}.png")
    )


def test_a_repeated_picture_says_of_itself_what_the_first_does(
    pictures: Path, tmp_path: Path
) -> None:
    run("--like", pictures / "x-3.jpg", "--output", tmp_path / "y.png")
    with (
        open_png(tmp_path / "y.png") as ours,
        open_png(pictures / "x-3.png") as first,
    ):
        assert ours.text == first.text


def like(*arguments: object) -> Any:
    return parse(*map(str, ("--like", *arguments)))


def test_options_given_beside_a_picture_override_it(
    pictures: Path, tmp_path: Path
) -> None:
    picture, output = pictures / "x-4.png", ("--output", tmp_path / "y.png")
    job = like(picture, *output)
    assert job.request.prompts == ("a red circle \U0001f600", 'zwei \u2605: "x", y')
    assert (job.request.width, job.request.height) == (96, 128)
    assert (job.request.guidance_scale, job.request.true_cfg_scale) == (2.5, 2.0)
    assert job.request.negative_prompt == "dull: grey, \u65e5\u672c"
    assert job.cache == TaylorSeerConfig(warmup_steps=2)
    assert (job.model, job.dtype, job.num_images) == ("demo", "float32", 1)
    job = like(picture, *output, "--seed", 5, "--steps", 9, "--model", "other")
    assert (job.request.seed, job.request.num_inference_steps) == (5, 9)
    assert (job.model, job.num_images) == ("other", 1)
    job = like(picture, *output, "--num-images", 3)
    assert (job.request.num_images_per_prompt, job.num_images) == (3, 6)
    job = like(picture, *output, "--cache-option", "max_order=2")
    assert job.cache == TaylorSeerConfig(warmup_steps=2, max_order=2)
    assert like(picture, *output, "--cache", "none").cache == NoCacheConfig()
    job = parse("one", "--like", str(picture), "--output", str(tmp_path / "y.png"))
    assert (job.request.prompts, job.num_images) == (("one",), 2)


def test_a_picture_with_a_seed_of_its_own_keeps_one(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    files = ("--output", tmp_path / "x.png")
    run("a", "--num-images", 2, "--seed", "3,4", "--steps", 2, *files)
    second = tmp_path / "x-2.png"
    done = run("--like", second, "--output", tmp_path / "y.png")
    assert done.stdout.startswith(f"{tmp_path / 'y.png'}: seed 4, ")
    assert np.array_equal(pixels(tmp_path / "y.png"), pixels(second))

    done = run("--like", second, "--seed", 9, "--output", tmp_path / "z.png")
    assert done.stdout.startswith(f"{tmp_path / 'z.png'}: seed 9, ")
    run("a", "--seed", 9, "--steps", 2, "--output", tmp_path / "alone.png")
    assert np.array_equal(pixels(tmp_path / "z.png"), pixels(tmp_path / "alone.png"))


def rewritten(path: Path, change: dict[str, Any]) -> None:
    """A picture whose settings say something else."""
    settings = {
        **{"prompts": ["a"], "num_images": 1, "picture": 0, "cache": {"name": "none"}},
        **{"seed": 1, "num_inference_steps": 1, "model": "demo", "dtype": "float32"},
        **{"device": "cpu", "versions": {"max-diffusion": "0.1.0", "max": "26.7.0"}},
    }
    text = {"max_diffusion": json.dumps(settings | change)}
    save_frames(path, np.zeros((1, 2, 2, 3), np.uint8), text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "a"}, "its settings are not whole"),
        ({"prompts": []}, "its settings are not whole"),
        ({"prompts": [1]}, "a prompt must be text, got int"),
        ({"num_images": 1.5}, "its settings are not whole"),
        ({"num_images": 3, "prompts": ["a", "b"]}, "its settings are not whole"),
        ({"picture": 1}, "its settings are not whole"),
        ({"cache": "none"}, "its settings are not whole"),
        ({"cache": {"name": "new"}}, "cache: expected none, "),
        ({"cache": {"name": "taylorseer", "x": 1}}, "taylorseer has no option 'x'"),
        ({"seed": "7"}, "seed"),
        ({"height": 1.5}, "height must be a whole number, got 1.5"),
        ({"model": 7}, "its model must be text, got 7"),
    ],
)
def test_settings_that_make_no_request_are_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rewritten(tmp_path / "x.png", change)
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        like(tmp_path / "x.png", "--output", tmp_path / "y.png")
    assert "\n" not in str(caught.value)


def test_a_picture_of_another_version_is_repeated_with_a_warning(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    versions = {"max-diffusion": "0.0.9", "max": "26.7.0"}
    rewritten(tmp_path / "x.png", {"versions": versions, "model": "no-such"})
    output = tmp_path / "y.webp"
    done = run("--like", tmp_path / "x.png", "--model", "demo", "--output", output)
    assert done.returncode == 0
    start = f"warning: {tmp_path / 'x.png'}: drawn with "
    assert done.stderr.splitlines() == [
        f"{start}model no-such, now with demo; the picture may be another",
        f"{start}version of max-diffusion 0.0.9, now with 0.1.0; the picture may be "
        "another",
    ]
    assert pixels(output).shape == (128, 128, 3)


def test_a_picture_without_settings_is_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    done = run("--like", tmp_path / "x.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {tmp_path / 'x.png'}: expected the settings that max-diffusion writes "
        "into pictures, got none; was the file written by another program since?\n"
    )


def test_a_transformer_s_file_goes_with_its_model(tmp_path: Path) -> None:
    report = make_report(model="folder", transformer="flux.gguf", num_images=1)
    picture, output = tmp_path / "x.png", ("--output", tmp_path / "y.png")
    frames = np.zeros((1, 16, 16, 3), np.uint8)
    save_frames(picture, frames, text_chunks(report, 0))
    job = like(picture, *output)
    assert (job.model, job.transformer) == ("folder", "flux.gguf")
    job = like(picture, *output, "--model", "other")
    assert (job.model, job.transformer) == ("other", None)
    job = like(picture, *output, "--transformer", "mine")
    assert (job.model, job.transformer) == ("folder", "mine")
    now = make_report(model="folder", num_images=1)
    assert job.like.differences(now, set()) == [
        f"{picture}: drawn with transformer flux.gguf, now with None; the picture may "
        "be another"
    ]
