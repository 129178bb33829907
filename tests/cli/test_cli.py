"""The command line, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from max_diffusion import RequestError, TaylorSeerConfig, TextToImagePipeline
from max_diffusion.cli import _cache

COMMAND = [sys.executable, "-m", "max_diffusion.cli", "generate"]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    line = [*COMMAND, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **options)


def test_a_picture_with_report_and_timeline(
    flux: TextToImagePipeline, flux_folder: Path, tmp_path: Path
) -> None:
    """The fixture has compiled the folder, so this process finds it compiled."""
    done = run(
        "two green stars",
        *("--model", flux_folder, "--steps", 12, "--seed", 4, "--json"),
        *("--output", tmp_path / "x.png", "--timeline", tmp_path / "t.png"),
        *("--cache", "taylorseer", "--cache-option", "cache_interval=3"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["files"] == [str(tmp_path / "x.png")]
    assert report["full_passes"] == 10
    assert report["cache"]["cache_interval"] == 3
    wanted = flux.generate(
        "two green stars",
        seed=4,
        num_inference_steps=12,
        cache=TaylorSeerConfig(cache_interval=3),
    ).images[0]
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), wanted)
        assert image.text["prompt"] == "two green stars"
    with Image.open(tmp_path / "t.png") as image:
        assert image.width >= 640


def test_several_pictures_and_one_line_each(
    flux: TextToImagePipeline, flux_folder: Path, tmp_path: Path
) -> None:
    done = run(
        *("a", "b", "--model", flux_folder, "--steps", 1, "--num-images", 2),
        *("--output", tmp_path / "x.png"),
    )
    assert done.returncode == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x-1.png", "x-2.png", "x-3.png", "x-4.png"]
    assert len(done.stdout.splitlines()) == 4
    assert "seed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "--steps", "0"], 2, "num_inference_steps must be at least 1"),
        (["a", "--width", "1001"], 2, "width must be a multiple of 4 pixels"),
        (["a", "--output", "/no/such/x.png"], 2, "does not exist"),
        (["a", "--cache", "tea"], 2, "invalid choice: 'tea'"),
        (["a", "--cache-option", "x=1"], 2, "none has no option 'x'; it has none"),
        (["a", "--device", "tpu"], 2, "expected auto, cpu, gpu or gpu:INDEX"),
        (["a", "--device", "gpu:7"], 5, "GPUs here"),
        (["a", "--model", "no-such-model"], 3, "no folder here and no hub repository"),
        ([], 2, "required: PROMPT"),
    ],
)
def test_bad_arguments_are_one_line_and_a_code(
    flux: TextToImagePipeline,
    flux_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(flux_folder)]
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_cache_options_are_parsed_by_their_types() -> None:
    options = ["cache_interval=3", "max_order=2"]
    assert _cache("taylorseer", options) == TaylorSeerConfig(3, 9, 2)
    assert _cache("first-block", ["threshold=0.2"]).threshold == 0.2
    with pytest.raises(RequestError, match="cache_interval must be a whole number"):
        _cache("taylorseer", ["cache_interval=2.5"])
    with pytest.raises(RequestError, match="expected key=value, got 'x'"):
        _cache("taylorseer", ["x"])
    with pytest.raises(RequestError, match="it has cache_interval, max_order, warmup"):
        _cache("taylorseer", ["interval=3"])


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_ends_cleanly(
    flux: TextToImagePipeline, flux_folder: Path, tmp_path: Path, signals: int
) -> None:
    process = subprocess.Popen(
        [
            *COMMAND,
            *("a", "--model", str(flux_folder), "--steps", "1000000"),
            *("--output", str(tmp_path / "x.png")),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    time.sleep(6)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
