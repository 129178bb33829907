"""``--lora`` of the command line, and pictures that say with which they were drawn."""

from __future__ import annotations

import json
from pathlib import Path

import lora_files
import numpy as np
import processes
import pytest
from commands import run
from PIL import Image
from serving import COMMAND as SERVE

from max_diffusion import demo_model_path
from max_diffusion.media.metadata import read_settings

STEPS = ("--steps", 4, "--width", 64, "--height", 64)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the demo model."""
    shapes = lora_files.matrices(demo_model_path(), "transformer")
    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    return lora_files.write(path, lora_files.lora("kohya", shapes, strength=0.1))


def test_a_picture_says_its_lora_and_is_repeated(file: Path, tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{name}.png" for name in "abc")
    done = run(
        *("a red circle", "--seed", 1, *STEPS, "--lora", f"{file}:0.8", "--json"),
        *("--output", first),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["loras"] == {str(file): 0.8}
    assert read_settings(first)["loras"] == {str(file): 0.8}
    with Image.open(first) as image:
        assert 'Loras: "style:0.8"' in image.info["parameters"]
    done = run("--like", first, "--output", again)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.array_equal(pixels(first), pixels(again))
    done = run("--like", first, "--lora", f"{file}:0.1", "--output", other)
    assert (done.returncode, done.stderr) == (0, "")
    assert not np.array_equal(pixels(first), pixels(other))
    file.rename(file.with_suffix(".gone"))
    try:
        done = run("--like", first, "--output", again)
    finally:
        file.with_suffix(".gone").rename(file)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {first}: drawn with the LoRA '{file}', which is no file here; give it "
        "by --lora FILE:0.8"
    ]


def test_what_is_wrong_is_one_line(file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:1000])
    for given, code, message in (
        ([f"{file}:much"], 2, "expected FILE or FILE:WEIGHT with a number"),
        ([f"{file}:nan"], 2, "must be a finite number, got nan"),
        ([str(file), f"{file}:0.5"], 2, "is given twice"),
        ([str(broken)], 3, "truncated"),
        ([str(tmp_path / "none.safetensors")], 3, "cannot be read"),
    ):
        options = [word for each in given for word in ("--lora", each)]
        done = run("a red circle", *options, "--output", tmp_path / "x.png")
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    done = processes.run(
        *(*SERVE, "--port", "0", "--lora", f"a={file}", "--lora-memory", "1KiB"),
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: adapters: the LoRA a changes matrices of ")
    assert "more than the limit of 1024 for LoRAs" in error
    for text, message in (
        (["style"], "expected NAME=FILE"),
        (["a=x", "a=y"], "'a' names two files, x and y"),
    ):
        options = [word for each in text for word in ("--lora", each)]
        done = processes.run(*SERVE, *options, timeout=120)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
