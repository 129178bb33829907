"""Reports, PNG files and the timeline picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from max_diffusion import RequestError, RunReport, StepRecord
from max_diffusion.media.images import check_writable, output_paths
from max_diffusion.media.timeline import draw_timeline
from max_diffusion.media.writers import save_frames


def make_report(samples: int = 2, steps: int = 6) -> RunReport:
    records = tuple(
        StepRecord(
            step=step,
            branch=branch,
            sigma=1 - step / steps,
            timestep=1000 * (1 - step / steps),
            actions=tuple(
                "compute" if (step + sample) % 3 == 0 else "reuse"
                for sample in range(samples)
            ),
            signal=(float("inf"),) * samples,
            milliseconds=5.0,
        )
        for step in range(steps)
        for branch in ("conditional", "unconditional")
    )
    return RunReport(
        model="demo",
        device="cpu",
        dtype="float32",
        prompts=("a red circle", "zwei Sterne ★"),
        negative_prompt="",
        height=128,
        width=96,
        num_inference_steps=steps,
        guidance_scale=3.5,
        true_cfg_scale=2.0,
        seed=17,
        num_images=samples,
        image_tokens=64,
        text_tokens=32,
        cache={"name": "first-block", "threshold": 0.05},
        steps=records,
        cache_bytes=1234,
        load_seconds=0.1,
        compile_seconds=0.2,
        compile_count=1,
        encode_seconds=0.0,
        denoise_seconds=0.5,
        decode_seconds=0.1,
        total_seconds=0.7,
        warnings=("w",),
        versions={"max-diffusion": "0.1.0"},
    )


def test_report_counts_passes_and_is_json() -> None:
    report = make_report()
    assert report.total_passes == 24
    assert report.full_passes == 8
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["full_passes"] == 8
    assert plain["steps"][0]["signal"] == [None, None]
    assert plain["steps"][0]["actions"] == ["compute", "reuse"]
    assert plain["prompts"][1] == "zwei Sterne ★"


def test_several_pictures_are_numbered() -> None:
    assert output_paths(Path("a/x.png"), 1) == [Path("a/x.png")]
    assert output_paths(Path("a/x.png"), 2) == [Path("a/x-1.png"), Path("a/x-2.png")]


def test_unwritable_paths_are_said_first(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for path, message in (
        (tmp_path / "x.bmp", "must end in .png"),
        (tmp_path / "no" / "x.png", "does not exist"),
        (tmp_path / "folder.png", "is a folder"),
    ):
        with pytest.raises(RequestError, match=message):
            check_writable(path, "output")
    check_writable(tmp_path / "x.png", "output")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    (tmp_path / "x.png").mkdir()
    with pytest.raises(RequestError, match="cannot be written"):
        save_frames(tmp_path / "x.png", frames, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def main_colours(image: Image.Image) -> set[object]:
    colours = image.getcolors(1 << 20)
    assert colours is not None
    return {colour for count, colour in colours if count > 200}


def test_timeline_shows_every_action_and_its_share() -> None:
    report = make_report()
    shown = main_colours(draw_timeline(report).convert("RGB"))
    assert (0x24, 0x56, 0xC8) in shown  # computed
    assert (0x5F, 0xBF, 0x8F) in shown  # reused
    assert (0xF2, 0xB1, 0x34) not in shown  # nothing was forecast
    everything = tuple(
        replace(record, actions=("compute", "compute")) for record in report.steps
    )
    shown = main_colours(draw_timeline(replace(report, steps=everything)))
    assert (0x5F, 0xBF, 0x8F) not in shown
