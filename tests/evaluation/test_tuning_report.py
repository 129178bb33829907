"""What a search leaves: a cache file, a page, a chart and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page, check_alone
from painters import STEPS, Painter
from PIL import Image

from max_diffusion import (
    AbstractCacheConfig,
    RequestError,
    TeaCacheConfig,
    read_cache_file,
)
from max_diffusion.evaluation import Setting, Target, TuningResult, save_tuning, tune
from max_diffusion.evaluation.target import Trial
from max_diffusion.evaluation.tuning_report import pareto_chart, pareto_front

PROMPTS = ("a", "<script>alert(1)</script>")


def behave(cache: AbstractCacheConfig, steps: int, prompt: str) -> tuple[float, float]:
    if isinstance(cache, TeaCacheConfig):
        return 2 / (1 + 2 * cache.threshold), min(0.5 + 60 * cache.threshold**2, 60.0)
    return steps / 10, 60 * (1 - steps / STEPS)


def search(target: Target, **options: Any) -> TuningResult:
    painter: Any = Painter(behave, names=("teacache",))
    prompts = {"prompts": PROMPTS, "validation_prompts": ("u & v", "w")}
    return tune(painter, target, budget_seconds=1e9, **prompts | options)


@pytest.fixture(scope="module")
def result() -> TuningResult:
    return search(Target(psnr=40.0))


def trial(speedup: float, *psnrs: float) -> Trial:
    setting = Setting.with_cache(TeaCacheConfig(threshold=speedup), 5)
    count = len(psnrs)
    return Trial(setting, list(psnrs), [1 / speedup] * count, [speedup] * count, 1)


def test_the_cache_file_is_the_winner(result: TuningResult, tmp_path: Path) -> None:
    files = save_tuning(result, tmp_path / "new")
    assert [path.name for path in files] == [
        *("cache.json", "report.html", "tuning.json", "pareto.png")
    ]
    assert set(files[0].parent.iterdir()) == set(files)
    assert read_cache_file(files[0]) == result.winner.cache == TeaCacheConfig(0.28)
    data = json.loads(files[0].read_text())
    assert data["tuning"] == {
        "model": "painter",
        "num_inference_steps": STEPS,
        "target": "every picture at 40 dB or more",
        "is_met": True,
        "validation": result.nearest_words,
    }
    assert json.loads(files[2].read_text()) == result.to_dict()
    with Image.open(files[3]) as image:
        image.load()
        assert (image.format, image.mode) == ("PNG", "RGB")


def test_the_page_needs_nothing_else_and_shows_the_chart(
    result: TuningResult, tmp_path: Path
) -> None:
    _, path, _, chart = save_tuning(result, tmp_path)
    text = path.read_text(encoding="utf-8")
    check_alone(text)
    page = Page(text)
    with Image.open(chart) as image:
        [shown] = page.pictures
        assert np.array_equal(shown, np.asarray(image))
    words = page.words
    assert "Found: teacache:threshold=0.28 . On 2 prompts that it was not" in words
    assert result.nearest_words in words
    assert f"{len(result.trials)} settings tried on 2 prompts" in words
    assert "when the time was over" not in words
    assert "; 1 validated." in words
    for front in pareto_front(result.trials, len(PROMPTS)):
        assert front.setting.label in words
    assert "Not tried" in words
    assert "first-block : cache: no first-block here" in words


def test_the_page_tells_that_nothing_reaches_the_target(tmp_path: Path) -> None:
    result = search(Target(speedup=9.0), methods=["teacache"])
    over = replace(result, is_finished=False)
    _, path, *_ = save_tuning(over, tmp_path)
    words = Page(path.read_text(encoding="utf-8")).words
    assert (
        "Not found: no setting tried before the time was over reaches 9 times as fast. "
        "Nearest is teacache:threshold=0.8" in words
    )
    assert "when the time was over" in words
    assert "Not tried" not in words
    tuning = json.loads((tmp_path / "cache.json").read_text())["tuning"]
    assert (tuning["is_met"], tuning["target"]) == (False, "9 times as fast")
    assert read_cache_file(tmp_path / "cache.json") == result.winner.cache


def test_equal_pictures_have_no_decibels_on_the_page(
    result: TuningResult, tmp_path: Path
) -> None:
    winner = replace(result.trials[0], psnrs=[math.inf] * 2)
    _, path, *_ = save_tuning(
        replace(result, trials=(winner, *result.trials[1:])), tmp_path
    )
    words = Page(path.read_text(encoding="utf-8")).words
    assert f"{winner.setting.label} {winner.speedup:.2f} equal" in words
    assert "inf dB" not in words


def test_a_file_in_place_of_the_folder_is_an_error(
    result: TuningResult, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file cannot be made"):
        save_tuning(result, tmp_path / "file")


def test_the_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    trials = [
        trial(float(speedup), float(psnr), 99.0)
        for speedup, psnr in rng.integers(1, 30, (60, 2))
    ]
    front = pareto_front(trials, 2)

    def beats(a: Trial, b: Trial) -> bool:
        mine, theirs = ((t.speedup, t.worst_psnr) for t in (a, b))
        return mine[0] >= theirs[0] and mine[1] >= theirs[1] and mine != theirs

    assert not any(beats(a, b) for a in trials for b in front)
    figures = {(t.speedup, t.worst_psnr) for t in front}
    for other in trials:
        is_beaten = any(beats(one, other) for one in trials)
        assert is_beaten != ((other.speedup, other.worst_psnr) in figures)
    speeds = [t.speedup for t in front]
    assert speeds == sorted(set(speeds), reverse=True)
    assert len(figures) == len(front) > 2


def test_the_front_is_of_settings_drawn_for_all_prompts() -> None:
    whole, part = trial(2.0, 40.0, 41.0), trial(3.0, 50.0)
    assert pareto_front([part, whole], 2) == [whole]
    assert pareto_front([part], 2) == []
    assert pareto_front([whole, trial(2.0, 40.0, 60.0)], 2) == [whole]


@pytest.mark.parametrize(
    "target", [Target(psnr=40.0), Target(speedup=1.5), Target(seconds=1.3)]
)
def test_the_chart_has_lines_for_the_target(
    result: TuningResult, target: Target
) -> None:
    red = (0xC0, 0x39, 0x2B)
    chart = np.asarray(pareto_chart(replace(result, target=target)))
    is_red = (chart == red).all(axis=2)
    across, up = is_red.sum(axis=1).max(), is_red.sum(axis=0).max()
    if target.psnr is None:
        assert up > 200 > 20 > across
    else:
        assert across > 200 > 20 > up
