"""A family of videos from outside, from its options to its files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_video
from new_model import ToyPipeline, write_folder
from PIL import Image, ImageSequence
from sketcher import Sketcher, ask, asked, post
from toy_video import ToyVideoOptions, ToyVideoPipeline

from max_diffusion import (
    GenerationRequest,
    MaxDiffusionError,
    RequestError,
)
from max_diffusion.cli.main import main
from max_diffusion.core.buffers import to_device
from max_diffusion.core.grid import Grid
from max_diffusion.engine import Engine, Preview, SubmitOptions
from max_diffusion.media.metadata import read_settings
from max_diffusion.pipelines.decoding import decode_in_goes
from max_diffusion.serving.http import ModelDescription
from max_diffusion.serving.http.backend import VideoDescription


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    with toy_video.registered():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_video.write_folder(tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="module")
def pipeline(folder: Path, family: None) -> ToyVideoPipeline:
    return toy_video.load(folder)


@pytest.mark.parametrize(("asked", "count"), [({}, 3), ({"num_frames": 5}, 5)])
def test_frames_are_drawn(
    pipeline: ToyVideoPipeline, asked: dict[str, Any], count: int
) -> None:
    result = pipeline.generate(["gray 40", "gray 200"], **asked, seed=1)
    assert result.frames.shape == (2, count, 4, 6, 3)
    assert np.abs(result.frames[0].astype(int) - 40).max() <= 1
    assert np.abs(result.frames[1].astype(int) - 200).max() <= 1
    assert result.fps == 8.0
    assert result.report.options == {"num_frames": count, "fps": 8.0}
    assert result.report.image_tokens == count * 6
    with pytest.raises(MaxDiffusionError, match=f"got videos of {count}; use frames"):
        _ = result.images


def test_one_frame_is_an_image(pipeline: ToyVideoPipeline) -> None:
    result = pipeline.generate("gray 40", num_frames=1)
    assert result.images.shape == (1, 4, 6, 3)


def test_frames_lie_on_the_grid_of_tokens(pipeline: ToyVideoPipeline) -> None:
    request = GenerationRequest(("gray 1",), options={"num_frames": 4, "fps": 12})
    context = pipeline.create_context(request)
    assert context.options == ToyVideoOptions(4, 12.0)
    assert (context.num_frames, context.fps) == (4, 12.0)
    assert context.grid == Grid(4, 2, 3)
    assert context.latents.shape == (1, 24, 12)


def test_goes_of_videos_are_the_same_to_the_bit(pipeline: ToyVideoPipeline) -> None:
    request = GenerationRequest(("gray 1",), num_images_per_prompt=3)
    context = pipeline.create_context(request)
    latents = to_device(context.latents, pipeline.device)
    at_once = pipeline.decode(context, latents)
    each = pipeline.decode_bytes(4, 6, 3)
    assert each == 3 * pipeline.decode_bytes(4, 6, 1)
    for room in (None, 0, each, 2 * each):
        assert np.array_equal(decode_in_goes(pipeline, context, latents, room), at_once)


def test_the_engine_draws_the_same_frames(pipeline: ToyVideoPipeline) -> None:
    requests = [
        GenerationRequest((f"gray {n}",), seed=n, options={"num_frames": 1 + n % 4})
        for n in range(6)
    ]
    with Engine(pipeline) as engine:
        options = SubmitOptions(num_previews=2)
        handles = [engine.submit(request, options) for request in requests]
        for handle, request in zip(handles, requests, strict=True):
            alone = pipeline.draw(request).frames
            assert np.array_equal(handle.result(60).frames, alone)
            previews = [e for e in handle.events() if isinstance(e, Preview)]
            assert {preview.frames.shape for preview in previews} == {alone.shape}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_frames": 10}, "num_frames must be at most 9, got 10"),
        ({"fps": 0.5}, "fps must be at least 1, got 0.5"),
        (
            {"max_sequence_length": 9},
            "max_sequence_length is no option of ToyVideoPipeline; it has num_frames,",
        ),
    ],
)
def test_what_the_family_does_not_take_is_named(
    pipeline: ToyVideoPipeline, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pipeline.generate("gray 1", **asked)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_command_line_takes_its_options(
    folder: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"x.{suffix}"
    words = ["generate", "gray 90", "--model", str(folder), "--output", str(path)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--num-frames", "4", "--fps", "10", "--seed", "3", "--json"])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_frames"], report["fps"]) == (4, 10.0)
    with Image.open(path) as image:
        shown = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)]
    # A viewer's file may join frames that are equal, which the toy's nearly are.
    assert 1 <= len(shown) <= 4
    assert abs(shown[0].mean() - 90) < 3
    again = tmp_path / "again.gif"
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--like", str(path), "--output", str(again)])
    assert ended.value.code == 0
    settings = read_settings(again)
    assert (settings["num_frames"], settings["fps"], settings["seed"]) == (4, 10.0, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "x.png"], "png cannot hold a video of 3 frames; write .webp,"),
        (["--output", "x.mp4", "--num-frames", "1"], "mp4 cannot hold an image"),
        (["--output", "x.gif", "--num-frames", "0"], "num_frames must be at least 1"),
        (["--output", "x.gif", "--max-sequence-length", "1"], "it has num_frames, fps"),
    ],
)
def test_a_slip_is_told_before_anything_is_drawn(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "gray 90", "--model", str(folder), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_of_another_family_are_left_out_with_a_word(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, again = tmp_path / "x.gif", tmp_path / "y.png"
    words = ["generate", "gray 90", "--model", str(folder), "--output", str(path)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--num-frames", "1"])
    assert ended.value.code == 0
    toy = write_folder(tmp_path / "toy")
    words = ["generate", "--like", str(path), "--model", str(toy)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(again)])
    said = capsys.readouterr().err
    assert ended.value.code == 0, said
    assert "drawn with num_frames 1, which this model does not have" in said
    assert "drawn with fps 8.0, which this model does not have" in said
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(again), "--num-frames", "1"])
    assert ended.value.code == 2
    assert "num_frames is no option of ToyPipeline" in capsys.readouterr().err


def test_a_frame_like_a_video_is_not_told_that_the_model_has_no_fps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, again = tmp_path / "x.gif", tmp_path / "y.png"
    words = ["a red circle moving right", "--model", "demo-video", "--steps", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["generate", *words, "--num-frames", "9", "--output", str(path)])
    assert ended.value.code == 0
    words = ["generate", "--like", str(path), "--num-frames", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(again)])
    said = capsys.readouterr().err
    assert ended.value.code == 0, said
    assert "this model does not have" not in said


def test_servers_are_told_what_videos_there_are(
    pipeline: ToyVideoPipeline, toy: ToyPipeline
) -> None:
    found = VideoDescription(num_frames=3, fps=8.0, counts=tuple(range(2, 10)))
    assert ModelDescription.of(pipeline).video == found
    assert ModelDescription.of(toy).video is None


def test_the_servers_schema_has_its_options() -> None:
    document = asyncio.run(ask(Sketcher(), "GET", "/openapi.json")).json()
    fields = document["components"]["schemas"]["ImageGenerationRequest"]["properties"]
    assert fields["num_frames"]["anyOf"][0] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 1025,
    }
    request, _ = asked({"prompt": "x", "num_frames": 3, "fps": 4.0})
    assert request.options == {"num_frames": 3, "fps": 4.0}
    error = post({"prompt": "x", "num_frames": 1026}).json()["error"]
    assert error["param"] == "num_frames"
    error = post({"prompt": "x", "num_frame": 1}).json()["error"]
    assert "did you mean num_frames?" in error["message"]
