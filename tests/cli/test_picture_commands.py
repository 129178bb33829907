"""Pictures to start from on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import processes
import pytest
from commands import COMMAND, parse, run
from flux1_editing import as_pipeline
from pictures import open_png
from PIL import Image

from max_diffusion import RequestError, demo_model_path
from max_diffusion.core.pictures import Picture


@pytest.fixture
def image(tmp_path: Path) -> Path:
    rows, columns = np.mgrid[:64, :96]
    waves = [127 * (1 + np.sin(rows / (6 + i) + columns / 9)) for i in range(3)]
    path = tmp_path / "scene.png"
    Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    marks = np.zeros((64, 96), np.uint8)
    marks[16:48, 32:80] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(marks).save(path)
    return path


def test_arguments_become_inputs(image: Path, mask: Path, tmp_path: Path) -> None:
    out = ("--output", str(tmp_path / "x.png"))
    given = ("--image", str(image), "--mask", str(mask), "--strength", "0.7")
    inputs = parse("a", *given, *out).request.inputs
    assert inputs.images == (Picture(np.asarray(Image.open(image))),)
    assert inputs.mask.marked(64, 96).sum() == 32 * 48
    assert inputs.strength == 0.7
    assert parse("a", *out).request.inputs is None
    several = parse("a", *given[:2], *given[:2], *out).request.inputs
    assert len(several.images) == 2


def test_what_is_wrong_is_said_before_a_model_is_opened(
    image: Path, mask: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("some notes")
    small = tmp_path / "small.png"
    Image.new("L", (8, 8)).save(small)
    for given, said in (
        (("--mask", mask), "mask must come with an image"),
        (("--strength", "0.5"), "strength must come with an image"),
        (("--image", text), f"image {text}: expected a PNG, JPEG or WebP, got text"),
        (("--image", tmp_path / "no.png"), "there is no such file"),
        (("--image", image, "--mask", small), "of the image's size, 96 x 64"),
        (("--image", image, "--strength", "0"), "strength must be above 0"),
        (("--image", image, "--strength", "1.5"), "at most 1"),
    ):
        with pytest.raises(RequestError, match=said):
            parse("a", *map(str, given), "--output", str(tmp_path / "x.png"))


def test_a_picture_is_drawn_and_repeated(
    image: Path, mask: Path, tmp_path: Path
) -> None:
    drawn, again = tmp_path / "drawn.png", tmp_path / "again.png"
    given = ("--image", image, "--mask", mask)
    done = run(
        *("a red circle", *given, "--strength", 0.7, "--steps", 6, "--seed", 4),
        *("--output", drawn),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 of 5 full passes" in done.stdout
    done = run("--like", drawn, "--output", again)
    assert done.returncode == 2
    assert done.stderr.endswith("which it does not hold; give that by --image\n")
    done = run("--like", drawn, *given, "--output", again)
    assert (done.returncode, done.stderr) == (0, "")
    with open_png(drawn) as first, open_png(again) as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))
        assert first.size == (96, 64)
    done = run("--like", drawn, "--image", image, "--output", again)
    assert done.returncode == 0
    assert "drawn with mask" in done.stderr


def test_a_reference_is_edited_and_repeated(image: Path, tmp_path: Path) -> None:
    folder = as_pipeline(demo_model_path(), tmp_path / "model", "FluxKontextPipeline")
    drawn, again = tmp_path / "drawn.png", tmp_path / "again.png"
    done = run(
        *("a red circle", "--model", folder, "--image", image, "--no-auto-resize"),
        *("--steps", 3, "--seed", 4, "--output", drawn),
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = run("--like", drawn, "--image", image, "--output", again)
    assert (done.returncode, done.stderr) == (0, "")
    with open_png(drawn) as first, open_png(again) as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))
        assert first.size == (96, 64)
    done = run("a", "--model", folder, "--image", image, "--strength", 0.5)
    assert done.returncode == 2
    assert "strength is no input of FluxKontextPipeline, which takes image;" in (
        done.stderr
    )
    done = processes.run(COMMAND[0], "inspect", folder, "--width", 64, "--height", 64)
    assert (done.returncode, done.stderr) == (0, "")
    assert "takes image\n" in done.stdout
    assert "16 image, 4096 reference and 32 text tokens" in done.stdout
