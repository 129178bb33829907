"""Writes what :func:`tune` found, as a cache file, a page, a chart and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..caches.cache_file import write_cache_file
from ..core.files import prepared_folder, write_text
from ..media.images import save_atomically
from .charts import Point, quality_chart
from .comparison_report import (
    data_url,
    decibels,
    given_pictures,
    metrics_words,
    summary_table,
)
from .pages import render
from .target import Trial
from .tuning_result import TuningResult


def save_tuning(result: TuningResult, folder: str | Path) -> list[Path]:
    """Writes ``cache.json``, ``report.html``, ``tuning.json`` and ``pareto.png``.

    Args:
        result: Result of :func:`tune`.
        folder: Folder to write to, made if it is missing; files of these names in it
            are replaced.

    Returns:
        The paths of all files written, the cache file's first.

    Raises:
        RequestError: A file cannot be written.
    """
    path = prepared_folder(folder)
    chart = pareto_chart(result)
    save_atomically(path / "pareto.png", chart)
    write_text(path / "tuning.json", json.dumps(result.to_dict(), indent=1) + "\n")
    page = render(
        "tuning.html",
        result=result,
        row=result.validation.of_kind("cache")[0],
        table=summary_table(result.validation),
        metrics_words=metrics_words(result.validation),
        chart=data_url(chart),
        starts=given_pictures(result.validation),
        decibels=decibels,
        front=pareto_front(result.trials, len(result.prompts)),
    )
    write_text(path / "report.html", page)
    write_cache_file(
        path / "cache.json",
        result.winner.cache,
        {
            "model": result.validation.model,
            "num_inference_steps": result.winner.num_inference_steps,
            "target": result.target_words,
            "is_met": result.is_met,
            "validation": result.nearest_words,
            **({"drawn": given} if (given := result.validation.given_words) else {}),
        },
    )
    names = ("cache.json", "report.html", "tuning.json", "pareto.png")
    return [path / name for name in names]


def pareto_front(trials: Sequence[Trial], num_prompts: int) -> list[Trial]:
    """Returns the settings that no other beats in both speed and worst PSNR.

    The fastest comes first.

    Args:
        trials: Settings that were tried, in any order.
        num_prompts: Number of prompts that a trial must have drawn to be compared.
    """
    done = [trial for trial in trials if len(trial.psnrs) == num_prompts]
    front: list[Trial] = []
    for trial in sorted(done, key=lambda t: (-t.speedup, -t.worst_psnr)):
        if not front or trial.worst_psnr > front[-1].worst_psnr:
            front.append(trial)
    return front


def pareto_chart(result: TuningResult) -> Image.Image:
    """Draws all settings tried, the best of them, the target and the winner."""

    def point(trial: Trial) -> Point:
        return Point(
            method=trial.setting.cache.name,
            label=trial.setting.label,
            seconds=result.baseline_seconds / trial.speedup,
            psnr=trial.worst_psnr,
            is_faint=len(trial.psnrs) < len(result.prompts),
        )

    target, comparison = result.target, result.validation
    seconds = target.seconds
    if target.speedup is not None:
        seconds = result.baseline_seconds / target.speedup
    winner = next(t for t in result.trials if t.setting == result.winner)
    front = pareto_front(result.trials, len(result.prompts))
    title = (
        f"{result.validation.model}: {len(result.trials)} settings tried for "
        f"{result.target_words}"
    )
    return quality_chart(
        "\n".join(filter(None, (title, comparison.given_words))),
        [point(trial) for trial in result.trials],
        [point(trial) for trial in result.fewer_steps],
        result.baseline_seconds,
        psnr_name=(
            f"worst PSNR of the {'frames' if comparison.is_video else 'pictures'} drawn"
        ),
        noun=comparison.noun,
        target_psnr=target.psnr,
        target_seconds=seconds,
        chosen=point(winner),
        front=[point(trial) for trial in front],
    )
