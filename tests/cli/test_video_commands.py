"""``compare``, ``tune`` and ``calibrate`` of a family of videos from outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_video
from folders import TEST_GRAPHS
from painters import Painter
from PIL import Image

from max_diffusion import TaylorSeerConfig, read_cache_file
from max_diffusion.caches import Calibration
from max_diffusion.cli.main import COMMANDS, _parser
from max_diffusion.pipelines import families

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    with toy_video.registered():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_video.write_folder(tmp_path_factory.mktemp("video"))


@pytest.fixture
def run(run: Run, folder: Path) -> Run:
    """Runs a command with the model."""
    graphs = TEST_GRAPHS / "toy"
    return lambda *words: run(*words, "--model", folder, "--precompiled", graphs)


SIZE = ("--height", 12, "--width", 12, "--steps", 12)


def test_videos_are_compared(run: Run, tmp_path: Path) -> None:
    code, output, errors = run(
        *("compare", "gray 60", "gray 90", "--runs", 1, "--caches", "taylorseer"),
        *(*SIZE, "--num-frames", 4, "--fps", 10, "--json"),
    )
    assert (code, errors) == (0, "")
    found = json.loads(output)
    assert (found["num_frames"], found["fps"]) == (4, 10.0)
    assert found["options"] == {"num_frames": 4, "fps": 10.0}
    baseline, cached, *_ = found["rows"]
    assert cached["full_passes"] < baseline["full_passes"] == 12
    assert baseline["scores"][0]["by_frame"]["psnr"] == [None] * 4
    assert baseline["flicker_worst"] == 0
    assert len(cached["scores"][1]["by_frame"]["ssim"]) == 4
    with Image.open(tmp_path / "comparison" / "contact-sheet.png") as sheet:
        assert sheet.width == 130 + 2 * (3 * 162 - 2 + 8) + 16


def test_the_table_says_what_its_columns_are(run: Run) -> None:
    code, output, errors = run(
        *("compare", "gray 60", "--runs", 1, "--caches", "step-mask", *SIZE),
    )
    assert (code, errors) == (0, "")
    for words in ("PSNR worst", "flicker worst", "those of its worst frame"):
        assert words in output
    assert max(len(line) for line in output.splitlines() if "│" in line) <= 160


def test_one_frame_is_compared_as_a_picture(run: Run) -> None:
    code, output, errors = run(
        *("compare", "gray 60", "--runs", 1, "--caches", "step-mask", *SIZE),
        *("--num-frames", 1),
    )
    assert (code, errors) == (0, "")
    assert "flicker" not in output
    assert "worst frame" not in output


def test_a_cache_is_tuned_for_videos(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("gray 120\n")
    code, output, errors = run(
        *("tune", "gray 60", "--validation-file", "x.txt", "--target-psnr", 30),
        *("--caches", "taylorseer", "--budget", 0.5, *SIZE),
        *("--num-frames", 2, "--json"),
    )
    found = json.loads(output)
    # Whether a toy is drawn faster is chance.
    assert (code, bool(errors)) == ((0, False) if found["is_met"] else (1, True))
    assert found["validation"]["num_frames"] == 2
    assert found["validation"]["options"] == {"num_frames": 2}
    tuned = tmp_path / "tuning" / "cache.json"
    assert isinstance(read_cache_file(tuned), TaylorSeerConfig)
    target = json.loads(tuned.read_text())["tuning"]["target"]
    assert target == "every frame at 30 dB or more"


def test_videos_are_calibrated(run: Run, tmp_path: Path) -> None:
    code, output, errors = run(
        *("calibrate", "gray 60", "gray 90", "--steps", 5, "--num-frames", 2),
        *("--output", "c.json"),
    )
    assert (code, errors) == (0, "")
    assert output.startswith("c.json: 2 videos of 5 steps; magcache ratios 1.000 to")
    found = Calibration.read(tmp_path / "c.json")
    assert found.magcache_ratios == pytest.approx((1.0,) * 5)


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "gray 60"),
        ("tune", "gray 60", "--target-psnr", 30),
        ("calibrate", "gray 60", "--output", "c.json"),
    ],
)
@pytest.mark.parametrize(
    ("slip", "message"),
    [
        (("--num-frames", 10), "num_frames must be at most 9, got 10"),
        (("--fps", 0.5), "fps must be at least 1, got 0.5"),
        (("--max-sequence-length", 4), "max_sequence_length is no option of ToyVideo"),
        (("--num-frame", 4), "unrecognized arguments: --num-frame 4; give all prompts"),
    ],
)
def test_a_slip_is_told_before_anything_is_compiled(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    slip: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setattr("max_diffusion.execution.compiler.CompiledGraphs.add", None)
    code, output, errors = run(*words, *slip)
    assert message in errors
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


def test_options_reach_what_is_drawn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    painter: Any = Painter()
    painter.compile = lambda: None
    monkeypatch.setattr(
        "max_diffusion.pipelines.opening.open_model", lambda *_, **__: painter
    )
    words = ("compare", "a", "--runs", 1, "--num-frames", 2, "--use-dynamic-cfg")
    code, _, errors = run(*words)
    assert (code, errors) == (0, "")
    wanted = {"num_frames": 2, "use_dynamic_cfg": True}
    assert {*map(repr, (request.options for request in painter.drawn))} == {
        repr(wanted)
    }


def test_no_family_can_take_the_name_of_a_commands_option() -> None:
    commands: Any = next(a for a in _parser()._actions if a.metavar == "COMMAND")
    takers = [name for name, each in COMMANDS.items() if each.takes_model_options]
    assert takers == ["generate", "inspect", "calibrate", "compare", "tune"]
    for name in takers:
        flags = commands.choices[name]._option_string_actions
        names = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
        assert names <= families._TAKEN, (name, names - families._TAKEN)
