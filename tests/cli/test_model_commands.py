"""``inspect`` and ``calibrate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import processes
import pytest

from max_diffusion import CACHES, RequestError, TextToImagePipeline
from max_diffusion.caches import CALIBRATION_FILE, Calibration
from max_diffusion.checkpoint import ModelFolder
from max_diffusion.cli.calibrate import CALIBRATE
from max_diffusion.cli.generate import resolve
from max_diffusion.cli.main import parse
from max_diffusion.cli.options import memory_size
from max_diffusion.cli.terminal import Interruption

COMMAND = str(Path(sys.executable).with_name("max-diffusion"))


def test_inspect_prints_weights_and_caches() -> None:
    done = processes.run(COMMAND, "inspect", "--dtype", "float32")
    assert (done.returncode, done.stderr) == (0, "")
    room = "are free: they fit as float32 and as bfloat16"
    for words in (*CACHES, "text_encoder_2", "6,336,672", "24.2 MiB", room):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 140


def test_inspect_prints_json_for_a_size_and_a_batch() -> None:
    one, four = (
        json.loads(processes.run(COMMAND, "inspect", "demo", "--json", *options).stdout)
        for options in ((), ("--batch", "2", "--true-guidance", "--width", "256"))
    )
    assert (one["image_tokens"], four["image_tokens"]) == (64, 128)
    for name in ("taylorseer", "first-block", "step-mask"):
        small, large = (x["caches"][name]["state_bytes"] for x in (one, four))
        assert large == 8 * small > 0
    assert set(CACHES) < set(one["caches"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "--height", "100"), "height must be a multiple of 16 pixels"),
        (("inspect", "nowhere/at-all/x"), "nowhere/at-all/x"),
        (("inspect", "--batch", "0"), "batch must be at least 1, got 0"),
        (("inspect", "--calibration", "none.json"), "cannot read none.json"),
        (("calibrate", "--output", "no/folder/c.json"), "--output"),
        (("calibrate", "--steps", "1", "--model", "no"), "must be at least 2, got 1"),
        (("calibrate", "--height", "15"), "height must be a multiple of 16"),
        (("calibrate", "--seed", str(2**65)), "seed"),
        (("inspect", "--batch", "9" * 30), "batch must be at most"),
        (("generate", "a", "--cache-memory-limit", "9" * 400), "such as 500KiB"),
        (("generate", "a", "--cache-memory-limit", "1 MB"), "such as 500KiB, 64MiB"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = processes.run(COMMAND, *arguments, cwd=tmp_path)
    assert done.returncode in (2, 3)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("500", 500), ("1.5KiB", 1536), ("64 MiB", 2**26), ("2GiB", 2**31)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert memory_size("--x", text) == count
    assert memory_size("--x", None) is None


def test_a_limit_becomes_part_of_the_request(tmp_path: Path) -> None:
    output = str(tmp_path / "x.png")
    args = ["generate", "a", "--output", output, "--cache-memory-limit", "1KiB"]
    assert resolve(parse(args)).request.cache_memory_limit == 1024
    with pytest.raises(RequestError, match="--x: expected a size"):
        memory_size("--x", "-1")


def test_calibrate_writes_what_was_measured(
    flux: TextToImagePipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = {}

    def load(*args: object, **options: Any) -> TextToImagePipeline:
        given.update(options)
        return flux

    monkeypatch.setattr("max_diffusion.pipelines.opening.open_model", load)
    path = tmp_path / "c.json"
    words = ["calibrate", "a", "heart", "--steps", "5", "--output", str(path), "--json"]
    args = parse(words)
    with Interruption() as interruption:
        CALIBRATE.run(args, interruption)
    result = Calibration.read(path)
    assert (result.num_images, len(result.magcache_ratios)) == (2, 5)
    assert given["caches"] == ("none", "magcache")
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == str(path)
    assert tuple(printed["magcache_ratios"]) == result.magcache_ratios


def test_calibrate_leaves_the_files_of_the_hubs_cache_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As huggingface_hub lays it out: contents by their hash, and links to them.
    blob, snapshot = tmp_path / "blob", tmp_path / "snapshot"
    snapshot.mkdir()
    blob.write_text("of the repository")
    (snapshot / CALIBRATION_FILE).symlink_to(blob)
    found = ModelFolder(snapshot, "FluxPipeline", {})
    measured = Calibration(magcache_ratios=(1.0, 0.9))
    for name, value in {
        "pipelines.opening.open_folder": (found, None),
        "pipelines.opening.open_model": MagicMock(),
        "evaluation.calibration.calibrate": measured,
    }.items():
        monkeypatch.setattr(f"max_diffusion.{name}", lambda *_, _v=value, **__: _v)
    args = parse(["calibrate", "a", "--model", "a/b", "--json"])
    with Interruption() as interruption:
        CALIBRATE.run(args, interruption)
    assert blob.read_text() == "of the repository"
    assert Calibration.read(snapshot / CALIBRATION_FILE) == measured
