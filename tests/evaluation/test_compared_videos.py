"""Comparisons and searches of videos; an image is the case of one frame."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_video
from pages import Page, check_alone
from painters import OFF, SIZE, STEPS, Painter, frame_of
from PIL import Image
from toy_video import ToyVideoPipeline

from max_diffusion import (
    AbstractCacheConfig,
    NoCacheConfig,
    RequestError,
    TaylorSeerConfig,
    TeaCacheConfig,
    calibrate,
)
from max_diffusion.demo import judge as demo_judge
from max_diffusion.evaluation import (
    Comparison,
    Target,
    TuningResult,
    compare,
    flicker,
    save_comparison,
    save_tuning,
    tune,
)
from max_diffusion.evaluation.comparison import shown_frames
from max_diffusion.evaluation.comparison_report import (
    contact_sheet,
    difference,
    metrics_words,
    shown_words,
    summary_table,
)

PROMPTS = ("a", "b")
FRAMES = 4


def behave(cache: AbstractCacheConfig, steps: int, prompt: str) -> tuple[float, float]:
    """Half the time, and of ``b`` twice the error, with a cache."""
    if isinstance(cache, NoCacheConfig):
        return steps / 10, float(STEPS - steps) / 10
    return steps / 20, {"a": 0.5, "b": 1.0}[prompt]


def paint(**options: Any) -> Comparison:
    pipeline: Any = options.pop("painter", None) or Painter(behave, names=("auto",))
    given: dict[str, Any] = {
        **{"runs": 1, "seed": 3, "options": {"num_frames": FRAMES}},
        **options,
    }
    return compare(pipeline, PROMPTS, ["auto"], **given)


def decibels(error: float) -> float:
    return 10 * math.log10(255**2 / error)


# Scores.


def test_the_worst_frame_of_the_worst_prompt_counts() -> None:
    found = paint()
    [row] = found.of_kind("cache")
    first, second = row.scores
    # The frames' squared errors are once, twice ... four times what a picture's is.
    for score, error in ((first, 0.5), (second, 1.0)):
        wanted = [decibels(error * count) for count in (1, 2, 3, 4)]
        assert score.by_frame["psnr"] == pytest.approx(wanted)
        assert score.psnr == pytest.approx(decibels(4 * error))
        assert score.metrics["mean_psnr"] == pytest.approx(decibels(2.5 * error))
        ssims = score.by_frame["ssim"]
        assert (len(ssims), score.ssim) == (FRAMES, min(ssims))
        assert score.metrics["mean_ssim"] == pytest.approx(sum(ssims) / FRAMES)
        # Of every value that is off by 8 in one frame and not in the one before.
        assert score.flicker == pytest.approx(error / OFF)
    assert row.metric("psnr")[1] == second.psnr
    assert row.metric("flicker") == (second.flicker, second.flicker)
    assert row.metric("mean_psnr")[0] == second.metrics["mean_psnr"]


def test_equal_videos_are_equal_and_do_not_flicker() -> None:
    row = paint().baseline
    for score in row.scores:
        assert score.by_frame == {"psnr": (math.inf,) * 4, "ssim": (1.0,) * 4}
        assert score.metrics == {
            **{"psnr": math.inf, "ssim": 1.0, "mean_psnr": math.inf, "mean_ssim": 1.0},
            "flicker": 0.0,
        }


def test_shuffled_frames_of_a_cache_are_told() -> None:
    """Each frame alone is as like another's as before; the video is not."""

    class Shuffling(Painter):
        def draw(self, request: Any, **options: Any) -> Any:
            result = super().draw(request, **options)
            if not isinstance(request.cache, NoCacheConfig):
                result.frames[0] = result.frames[0][[0, 2, 1, 3]]
            return result

    shuffled: Any = Shuffling(behave, names=("auto",))
    right, wrong = (
        paint(painter=painter).of_kind("cache")[0] for painter in (None, shuffled)
    )
    assert right.metric("flicker")[1] < 0.2 < 20 < wrong.metric("flicker")[0]
    assert wrong.metric("psnr")[0] < 20 < right.metric("psnr")[1]


def test_lpips_is_of_each_frame() -> None:
    lpips: Any = lambda a, b: float(np.mean(a != b))  # noqa: E731
    score = paint(lpips=lpips).of_kind("cache")[0].scores[0]
    shares = [0.5 * count / OFF**2 for count in (1, 2, 3, 4)]
    assert score.by_frame["lpips"] == pytest.approx(shares, abs=1e-3)
    assert score.lpips == score.metrics["lpips"] == max(score.by_frame["lpips"])
    assert score.metrics["mean_lpips"] == pytest.approx(np.mean(shares), abs=1e-3)


def test_options_reach_every_request() -> None:
    painter: Any = Painter(behave, names=("auto",))
    options = {"num_frames": 2, "fps": 5.0}
    found = paint(painter=painter, options=options)
    assert painter.drawn
    assert all(request.options == options for request in painter.drawn)
    assert (found.num_frames, found.fps, found.options) == (2, 8.0, options)
    assert (found.is_video, found.noun) == (True, "video")


def test_a_judge_is_given_all_frames() -> None:
    asked: list[np.ndarray] = []

    def judge(prompt: str, frames: np.ndarray) -> None:
        asked.append(frames)

    paint(judge=judge)
    assert {frames.shape for frames in asked} == {(FRAMES, SIZE, SIZE, 3)}
    wanted = np.stack([frame_of(3, index) for index in range(FRAMES)])
    assert any(np.array_equal(frames, wanted) for frames in asked)


def test_the_demo_models_judge_tells_nothing_of_videos() -> None:
    found = paint(judge=demo_judge)
    assert (found.num_judged, found.baseline.right) == (0, None)


# Reports.


def test_a_comparison_of_videos_is_plain_json() -> None:
    plain = paint().to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["num_frames"], plain["fps"]) == (FRAMES, 8.0)
    assert plain["options"] == {"num_frames": FRAMES}
    row = plain["rows"][1]
    assert row["psnr_worst"] == pytest.approx(decibels(4))
    assert row["mean_psnr_worst"] == pytest.approx(decibels(2.5))
    assert row["flicker_worst"] == pytest.approx(1 / OFF)
    score = row["scores"][0]
    assert score["by_frame"]["psnr"] == pytest.approx(
        [decibels(0.5 * count) for count in (1, 2, 3, 4)]
    )
    assert score["psnr"] == min(score["by_frame"]["psnr"])
    assert plain["rows"][0]["scores"][0]["by_frame"]["psnr"] == [None] * FRAMES


def test_one_frame_is_told_as_an_image_is() -> None:
    plain, other = (paint(options=o).to_dict() for o in ({}, {"num_frames": 1}))
    assert other.pop("options") == {"num_frames": 1}
    assert other == plain
    assert not {"num_frames", "fps", "options"} & set(plain)
    for row in plain["rows"]:
        assert not [key for key in row if "mean" in key or "flicker" in key]
        assert [*row["scores"][0]] == [
            *("prompt", "seed", "psnr", "ssim", "lpips", "is_right", "why_not")
        ]
    found = paint(options={"num_frames": 1})
    assert metrics_words(found) == ""
    assert not [n for n in summary_table(found) if "mean" in n or "flicker" in n]


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (4, (0, 1, 3)), (49, (0, 24, 48))],
)
def test_the_first_a_middle_and_the_last_frame_are_shown(
    count: int, wanted: tuple[int, ...]
) -> None:
    assert shown_frames(count) == wanted


def test_the_table_has_means_and_flicker() -> None:
    table = summary_table(paint())
    assert [n for n in table if n.endswith(("mean", "median", "worst"))] == [
        *("PSNR median", "PSNR worst", "SSIM median", "SSIM worst"),
        *("PSNR mean", "SSIM mean", "flicker median", "flicker worst"),
    ]
    cached = {name: cells[1] for name, cells in table.items()}
    assert cached["PSNR worst"] == f"{decibels(4):.1f}"
    assert cached["PSNR mean"] == f"{decibels(2.5):.1f}"
    assert cached["flicker worst"] == f"{1 / OFF:.3f}"
    assert table["flicker worst"][0] == ""


def test_the_sheet_has_a_strip_of_frames_in_each_place() -> None:
    found = paint(num_images=1)
    sheet = contact_sheet(found)
    [row] = found.of_kind("cache")
    baseline, control = found.baseline, found.control_of(row)
    assert row.frames.shape == (1, 3, SIZE, SIZE, 3)
    assert np.array_equal(baseline.frames[0, 2], frame_of(3, FRAMES - 1))
    step, strip = 162, 3 * 162 - 2  # frames of 160 pixels, gaps of 2
    shown = [(0, 0, baseline.frames[0])]
    for line, frames in ((0, row.frames[0]), (2, control.frames[0])):
        shown.append((1, line, frames))
        shown.append((1, line + 1, difference(frames, baseline.frames[0])))
    for column, line, frames in shown:
        x, y = 130 + column * (strip + 8), 108 + 30 + line * 168
        for index, frame in enumerate(frames):
            left = x + index * step
            cell = np.asarray(sheet.crop((left, y, left + 160, y + 160)))
            image = Image.fromarray(frame)
            wanted = image.resize((160, 160), Image.Resampling.LANCZOS)
            assert np.array_equal(cell, np.asarray(wanted)), (column, line, index)
    assert sheet.width == 130 + 2 * (strip + 8) + 16


def test_the_page_is_of_videos(tmp_path: Path) -> None:
    found = paint()
    path, *_ = save_comparison(found, tmp_path)
    text = path.read_text(encoding="utf-8")
    check_alone(text)
    page = Page(text)
    assert f"{FRAMES} frames at 8 a second, 20 steps" in page.words
    assert "Of each video frames 1, 2, 4 of 4 are shown." in page.words
    assert shown_words(found) == "frames 1, 2, 4 of 4"
    assert metrics_words(found) in page.words
    assert "picture" not in Page(text.partition("<body>")[2]).words
    words = f"cached, {decibels(4):.1f} dB at worst, mean {decibels(2.5):.1f} dB"
    assert f"{words}, flicker {1 / OFF:.3f}" in page.words
    [row] = found.of_kind("cache")
    strip = np.full((SIZE, 3 * (SIZE + 2) - 2, 3), 255, np.uint8)
    for index, frame in enumerate(row.frames[0]):
        strip[:, index * (SIZE + 2) :][:, :SIZE] = frame
    assert any(np.array_equal(picture, strip) for picture in page.pictures)


# Searches.


def search(target: Target) -> TuningResult:
    def price(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        if isinstance(cache, TeaCacheConfig):
            return 2 / (1 + 2 * cache.threshold), 0.2 + 8 * cache.threshold**2
        return steps / 10, 15 * (1 - steps / STEPS)

    painter: Any = Painter(price, names=("teacache",))
    return tune(
        painter,
        target,
        prompts=PROMPTS,
        validation_prompts=("u", "v"),
        budget_seconds=1e9,
        options={"num_frames": FRAMES},
    )


def test_a_search_goes_by_the_worst_frame(tmp_path: Path) -> None:
    result = search(Target(psnr=45.0))
    assert result.is_met
    cache = result.winner.cache
    assert isinstance(cache, TeaCacheConfig)
    ladder = TeaCacheConfig.ladders["threshold"]
    fine = [t for t in ladder if decibels(4 * (0.2 + 8 * t**2)) >= 45]
    # By the first frame, or by the mean, a larger one would do.
    assert cache.threshold == max(fine)
    for share in (1, 2.5):
        assert max(t for t in ladder if decibels(share * (0.2 + 8 * t**2)) >= 45) > max(
            fine
        )
    assert result.validation.num_frames == FRAMES
    given_up = {trial.given_up for trial in result.trials} - {""}
    assert any(words.startswith("a video at") for words in given_up)
    files = save_tuning(result, tmp_path)
    page = Page(files[1].read_text(encoding="utf-8"))
    assert "for every frame at 45 dB or more" in page.words
    assert f"{FRAMES} frames, 20 steps" in page.words
    assert metrics_words(result.validation) in page.words
    tuning = json.loads(files[0].read_text())["tuning"]
    assert tuning["target"] == "every frame at 45 dB or more"


def test_equal_videos_are_told_in_words() -> None:
    result = search(Target(seconds=1.5))
    assert result.target_words == "a video in 1.5 s"
    assert result._worst_words(math.inf) == "equal videos"
    assert result._worst_words(40.0) == "40.0 dB at worst"


# The toy family's videos.


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyVideoPipeline]:
    with toy_video.registered():
        yield toy_video.load(toy_video.write_folder(tmp_path_factory.mktemp("video")))


def test_videos_of_a_pipeline_are_compared(toy: ToyVideoPipeline) -> None:
    size: dict[str, Any] = {"height": 12, "width": 14, "num_inference_steps": 6}
    cache = TaylorSeerConfig(cache_interval=3, warmup_steps=2)
    options: dict[str, Any] = {"num_frames": 5, "fps": 12.0}
    found = compare(toy, "gray 70", [cache], seed=4, runs=1, options=options, **size)
    assert (found.num_frames, found.fps) == (5, 12.0)
    [row] = found.of_kind("cache")
    cached, plain = (
        toy.generate("gray 70", seed=4, cache=c, **size, **options).frames[0]
        for c in (cache, "none")
    )
    assert np.array_equal(row.frames[0], cached[[0, 2, 4]])
    [score] = row.scores
    assert (len(score.by_frame["psnr"]), score.num_frames) == (5, 5)
    assert score.flicker == flicker(cached, plain)
    errors = np.mean((cached.astype(float) - plain) ** 2, axis=(1, 2, 3))
    wanted = [decibels(error) if error else math.inf for error in errors]
    assert score.by_frame["psnr"] == pytest.approx(wanted)


def test_what_the_family_does_not_take_is_told_before_drawing(
    toy: ToyVideoPipeline,
) -> None:
    given: dict[str, Any] = {"options": {"num_frames": 10}}
    for ask in (
        lambda: compare(toy, "gray 1", **given),
        lambda: tune(toy, Target(psnr=30), **given),
        lambda: calibrate(toy, "gray 1", **given),
    ):
        with pytest.raises(RequestError, match="num_frames must be at most 9, got 10"):
            ask()


def test_videos_are_calibrated_over_all_their_tokens(
    toy: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    draw = toy.draw_noise

    def draw_noise(request: Any, grid: Any) -> np.ndarray:
        asked.append(grid.frames)
        return draw(request, grid)

    monkeypatch.setattr(toy, "draw_noise", draw_noise)
    found = calibrate(
        toy, ["gray 40", "gray 90"], num_inference_steps=4, options={"num_frames": 2}
    )
    # What the toy's blocks add is its gray, at every step.
    assert found.magcache_ratios == pytest.approx((1.0,) * 4)
    assert (found.num_images, set(asked)) == (2, {2})
    assert len(found.teacache_range) == 2


def test_branches_of_guidance_are_measured_each_alone(
    toy: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One's residual is not compared with the other's."""
    monkeypatch.setattr(ToyVideoPipeline, "default_true_cfg_scale", 2.0)
    monkeypatch.setattr(ToyVideoPipeline, "default_negative_prompt", "gray 200")
    found = calibrate(toy, "gray 40", num_inference_steps=4)
    assert found.magcache_ratios == pytest.approx((1.0,) * 4)
