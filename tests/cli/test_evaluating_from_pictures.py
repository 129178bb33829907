"""``compare``, ``tune`` and ``calibrate`` with ``--lora``, ``--image`` and the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import processes
import pytest
from flux1_editing import as_pipeline
from pictures import mask_of, scene
from PIL import Image

from max_diffusion import RequestError, TextToImagePipeline, demo_model_path
from max_diffusion.caches import CALIBRATION_FILE, Calibration
from max_diffusion.core.pictures import Picture
from max_diffusion.evaluation import Comparison

COMMAND = str(Path(sys.executable).with_name("max-diffusion"))
Run = Callable[..., tuple[int, str, str]]
SIZE = ("--width", 64, "--height", 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, a mask, a LoRA and models that take pictures or none."""
    folder = tmp_path_factory.mktemp("files")
    scene(64, 96, seed=5).save(folder / "scene.png")
    mask_of(64, 96).save(folder / "mask.png")
    Image.new("L", (8, 8)).save(folder / "small.png")
    (folder / "notes.txt").write_text("some notes")
    shapes = lora_files.matrices(demo_model_path(), "transformer")
    lora = lora_files.lora("kohya", shapes, strength=0.1)
    lora_files.write(folder / "style.safetensors", lora)
    as_pipeline(demo_model_path(), folder / "kontext", "FluxKontextPipeline")
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Comparison]:
    """What ``compare`` found, with its pictures, which no file has whole."""
    from max_diffusion.evaluation import save_comparison

    found: list[Comparison] = []

    def save(comparison: Comparison, folder: Path) -> list[Path]:
        found.append(comparison)
        return save_comparison(comparison, folder)

    monkeypatch.setattr("max_diffusion.evaluation.save_comparison", save)
    return found


@pytest.mark.parametrize("command", ["compare", "tune", "calibrate"])
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--mask", "mask.png"), 2, "mask must come with an image"),
        (("--strength", 0.5), 2, "strength must come with an image"),
        (("--image", "no.png"), 2, "image no.png: there is no such file"),
        (("--image", "notes.txt"), 2, "expected a PNG, JPEG or WebP, got text"),
        (
            ("--image", "scene.png", "--mask", "small.png"),
            2,
            "mask must be of the image's size, 96 x 64, got 8 x 8",
        ),
        (("--image", "scene.png", "--strength", 1.5), 2, "at most 1"),
        (("--image", "scene.png", "--strength", "x"), 2, "invalid float value: 'x'"),
        (("--image", "scene.png") * 2, 2, "image must be at most 1 for FluxPipeline"),
        (
            ("--image", "scene.png", "--strength", 0.5, "--model", "kontext"),
            2,
            "strength is no input of FluxKontextPipeline, which takes image;",
        ),
        (("--lora", "style.safetensors:much"), 2, "FILE or FILE:WEIGHT with a number"),
        (
            ("--lora", "style.safetensors", "--lora", "style.safetensors:0.5"),
            2,
            "--lora: 'style.safetensors' is given twice",
        ),
        (("--lora", "no.safetensors"), 3, "cannot be read"),
        (("--lora", "notes.txt"), 3, "notes.txt"),
    ],
)
@pytest.mark.usefixtures("no_compile")
def test_what_is_wrong_is_one_line(
    run: Run,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: tuple[object, ...],
    code: int,
    message: str,
) -> None:
    before = set(files.iterdir())
    own: dict[str, tuple[object, ...]] = {
        "compare": ("a red circle",),
        "tune": ("--target-psnr", 40),
        "calibrate": ("a red circle", "--output", "c.json"),
    }
    monkeypatch.chdir(files)
    found, output, errors = run(command, *own[command], *words)
    assert message in errors
    assert (found, output, errors.count("\n")) == (code, "", 1)
    assert set(files.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image", "scene.png"), "must be 1, got 0.6, as asked for or by default"),
        (("--image", "scene.png", "--strength", 0.9), "strength must be 1, got 0.9"),
    ],
)
@pytest.mark.usefixtures("no_compile")
def test_a_part_of_a_run_is_not_measured(
    run: Run,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(files)
    code, output, errors = run("calibrate", "a", *words, "--output", "c.json")
    assert message in errors
    assert (code, output, errors.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lora", "style.safetensors"), "--output: with --lora it must be given"),
        (
            ("--image", "scene.png", "--model", "kontext"),
            "--output: with --image it must be given, since this model also draws",
        ),
    ],
)
@pytest.mark.usefixtures("no_compile")
def test_the_models_own_measurements_are_of_itself(
    run: Run,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    message: str,
) -> None:
    own = files / "kontext" / CALIBRATION_FILE
    before = own.read_bytes()
    monkeypatch.chdir(files)
    code, output, errors = run("calibrate", "a", *words)
    assert message in errors
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert own.read_bytes() == before


def test_a_comparison_from_a_picture_draws_what_generate_draws(
    run: Run,
    files: Path,
    tmp_path: Path,
    demo_pictures: TextToImagePipeline,
    seen: list[Comparison],
) -> None:
    picture = (
        *("--image", files / "scene.png", "--mask", files / "mask.png"),
        *("--strength", 0.6, "--steps", 10, "--seed", 3),
    )
    cache = "step-mask:compute_steps=0,2,5"
    code, output, errors = run(
        *("compare", "a red circle", *picture, "--caches", cache, "--runs", 1),
        "--json",
    )
    assert (code, errors) == (0, "")
    found = json.loads(output)
    assert "/" not in json.dumps(
        {k: found[k] for k in ("images", "mask", "strength", "model")}
    )
    assert found["images"] == [
        Picture(np.asarray(Image.open(files / "scene.png"))).digest
    ]
    assert found["strength"] == 0.6
    passes = [(row["full_passes"], row["total_passes"]) for row in found["rows"][:2]]
    assert passes == [(6, 6), (3, 6)]
    drawn = [("none", ()), ("step-mask", ("--cache-option", "compute_steps=0,2,5"))]
    for row, (name, options) in zip(seen[0].rows[:2], drawn, strict=True):
        code, _, errors = run(
            *("generate", "a red circle", *picture, "--cache", name, *options),
            *("--output", "x.png"),
        )
        assert (code, errors) == (0, "")
        with Image.open(tmp_path / "x.png") as image:
            assert np.array_equal(np.asarray(image), row.images[0])


def test_a_comparison_with_a_lora_draws_what_generate_draws(
    run: Run,
    files: Path,
    tmp_path: Path,
    demo: TextToImagePipeline,
    seen: list[Comparison],
) -> None:
    lora = f"{files / 'style.safetensors'}:0.7"
    drawn = ("a red circle", *SIZE, "--steps", 4, "--seed", 6)
    for option in ((), ("--lora", lora)):
        code, output, errors = run(
            *("compare", *drawn, "--caches", "auto", "--runs", 1, *option, "--json")
        )
        assert (code, errors) == (0, "")
        loras = {str(files / "style.safetensors"): 0.7} if option else None
        assert json.loads(output).get("loras") == loras
        run("generate", *drawn, *option, "--output", "x.png")
        with Image.open(tmp_path / "x.png") as image:
            assert np.array_equal(np.asarray(image), seen[-1].baseline.images[0])
    plain, styled = seen
    assert not np.array_equal(plain.baseline.images, styled.baseline.images)
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert "drawn with LoRA style:0.7." in page


def test_measurements_without_the_lora_are_said(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(*args: object) -> None:
        raise RequestError("compiling begins")

    monkeypatch.setattr("max_diffusion.execution.compiler.CompiledGraphs.add", add)
    asked = ("compare", "a red circle", "--lora", files / "style.safetensors")
    for caches, said in (
        ("magcache", ["warning: magcache decides by what was measured without LoRAs,"]),
        ("magcache:ratios=1,taylorseer", []),
    ):
        _, _, errors = run(*asked, "--caches", caches)
        *warnings, error = errors.splitlines()
        assert error == "error: compiling begins"
        assert [line[: len(s)] for line, s in zip(warnings, said, strict=True)] == said


def test_whole_runs_with_a_lora_and_a_reference_are_measured(files: Path) -> None:
    measured = {}
    for name, options in {
        "plain": (),
        "styled": ("--lora", "style.safetensors"),
        "edited": ("--image", "scene.png", "--no-auto-resize"),
    }.items():
        done = processes.run(
            *(COMMAND, "calibrate", "a red circle", "--model", "kontext", *options),
            *(*SIZE, "--steps", 3, "--output", f"{name}.json"),
            cwd=files,
        )
        assert (done.returncode, done.stderr) == (0, "")
        found = Calibration.read(files / f"{name}.json")
        loras = (("style.safetensors", 1.0),) if name == "styled" else ()
        assert found.loras == loras
        measured[name] = found.magcache_ratios
    assert len({*measured.values()}) == 3
    assert all(len(ratios) == 3 for ratios in measured.values())


def test_a_search_takes_them_too(files: Path, tmp_path: Path) -> None:
    done = processes.run(
        *(COMMAND, "tune", "a red circle", "--target-psnr", 15, "--steps", 8),
        *("--caches", "taylorseer", "--budget", 0.5, "--json", "--image"),
        *(files / "scene.png", "--strength", 0.5, "--lora"),
        files / "style.safetensors",
        cwd=tmp_path,
    )
    assert done.returncode in (0, 1)
    found: dict[str, Any] = json.loads(done.stdout)
    validation = found["validation"]
    assert validation["strength"] == 0.5
    assert validation["loras"] == {str(files / "style.safetensors"): 1.0}
    assert validation["rows"][0]["total_passes"] == 4
    tuning = json.loads((tmp_path / "tuning" / "cache.json").read_text())["tuning"]
    assert tuning["drawn"].startswith("with LoRA style:1; from a picture of 96 x 64")
