"""Draws what docs/caches.md shows: every cache in several settings, on a demo model.

    .venv/bin/python scripts/compare_caches.py --prompts 20 --output comparison
    .venv/bin/python scripts/compare_caches.py --model demo-video --output videos

The folder then holds what ``max-diffusion compare`` writes, the documentation's table
(``caches.md``) and its timelines, one a cache.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from rich.progress import Progress

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    AutoConfig,
    FasterCacheConfig,
    FirstBlockConfig,
    MagCacheConfig,
    PabConfig,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    TextToImagePipeline,
    demo_model_path,
    load_pipeline,
)
from max_diffusion.caches import CALIBRATION_FILE, Calibration
from max_diffusion.demo import held_out_clip, held_out_scene, judge
from max_diffusion.evaluation import Comparison, Row, compare, save_comparison
from max_diffusion.media.timeline import draw_timeline

STEPS = 50
FEWER = (40, 30, 25, 20, 15, 12, 10, 8)
# The demo model's own, given so that the bar for the fit does not refuse them.
COEFFICIENTS = Calibration.read(
    demo_model_path() / CALIBRATION_FILE
).teacache_coefficients
MODULES = tuple(TaylorSeerConfig(target=target) for target in ("attention", "modules"))
COMPARED: tuple[AbstractCacheConfig, ...] = (
    TaylorSeerConfig(3, 4),
    TaylorSeerConfig(4, 4),
    TaylorSeerConfig(5, 9),
    TaylorSeerConfig(4, 4, 2),
    TaylorSeerConfig(4, 4, 2, coefficients="newton"),
    TaylorSeerConfig(4, 4, compute_last=2),
    TaylorSeerConfig(5, 9, target="attention"),
    TaylorSeerConfig(5, 9, target="modules"),
    AutoConfig(0.02),
    AutoConfig(0.05),
    AutoConfig(0.1),
    AutoConfig(0.2),
    FirstBlockConfig(0.05),
    FirstBlockConfig(0.1),
    FirstBlockConfig(0.2),
    FirstBlockConfig(0.1, tail_order=1),
    FirstBlockConfig(0.2, tail_order=1),
    FirstBlockConfig(0.1, back_blocks=1),
    MagCacheConfig(),
    MagCacheConfig(0.12, 4),
    MagCacheConfig(0.24, 5, 0.1),
    TeaCacheConfig(0.1, COEFFICIENTS),
    TeaCacheConfig(0.2, COEFFICIENTS),
    TeaCacheConfig(0.4, COEFFICIENTS),
    PabConfig(2),
    PabConfig(4),
    FasterCacheConfig(),
    FasterCacheConfig(attention_interval=4),
    StepMaskConfig(compute_steps="slow"),
    StepMaskConfig(compute_steps="medium"),
    StepMaskConfig(compute_steps="fast"),
    StepMaskConfig(compute_steps="ultra"),
)

# Of the video demo model, whose true guidance takes two passes a step.
COMPARED_VIDEOS: tuple[AbstractCacheConfig, ...] = (
    TaylorSeerConfig(3, 4),
    TaylorSeerConfig(4, 4),
    TaylorSeerConfig(),
    AutoConfig(0.05),
    AutoConfig(0.1),
    AutoConfig(0.2),
    FirstBlockConfig(0.05),
    FirstBlockConfig(0.1, tail_order=1),
    MagCacheConfig(),
    PabConfig(2),
    PabConfig(4),
    FasterCacheConfig(),
    StepMaskConfig(compute_steps="slow"),
    StepMaskConfig(compute_steps="medium"),
    StepMaskConfig(compute_steps="fast"),
)

# What docs/caches.md shows of each.
SHOWN: dict[str, AbstractCacheConfig] = {
    "taylorseer": TaylorSeerConfig(),
    "auto": AutoConfig(0.1),
    "step-mask": StepMaskConfig(compute_steps="fast"),
    "first-block": FirstBlockConfig(0.1, tail_order=1),
    "magcache": MagCacheConfig(),
    "teacache": TeaCacheConfig(0.2, COEFFICIENTS),
    "pab": PabConfig(),
    "fastercache": FasterCacheConfig(),
}


def main() -> None:
    """Draws, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", choices=("demo", "demo-video"), default="demo")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rng = np.random.default_rng(11)
    prompts: dict[str, None] = {}
    is_video = args.model == "demo-video"
    draw = held_out_clip if is_video else held_out_scene
    while len(prompts) < args.prompts:
        prompts[draw(rng).caption] = None
    caches: list[str | AbstractCacheConfig] = [*CACHES]
    if not is_video:
        caches += MODULES
    # The same on every processor, whether bfloat16 is its default or not.
    pipeline = load_pipeline(args.model, "cpu", "float32", caches=caches)
    with Progress() as progress:
        task = progress.add_task("comparing", total=1.0)
        comparison = compare(
            pipeline,
            list(prompts),
            COMPARED_VIDEOS if is_video else COMPARED,
            num_inference_steps=STEPS,
            fewer_steps=FEWER,
            runs=1,
            judge=judge,
            on_progress=lambda share, _: progress.update(task, completed=share),
        )
    save_comparison(comparison, args.output)
    (args.output / "caches.md").write_text(table(comparison, is_video=is_video))
    if not is_video:
        save_timelines(pipeline, args.output)


def table(comparison: Comparison, *, is_video: bool) -> str:
    """Rows of Markdown; of videos the worst frames' metrics."""
    heading = (
        *("", "ms", "speed-up", "passes saved", "PSNR worst", "median", "SSIM worst"),
        *(("flicker worst",) if is_video else ()),
        *("right", "in the same time", "PSNR median"),
    )
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for row in comparison.rows:
        coefficients = ",".join(map(str, COEFFICIENTS))
        label = row.label.removesuffix(f":coefficients={coefficients}")
        # Equal to itself; nothing to tell.
        is_baseline = row is comparison.baseline
        cells = [
            f"`{label}`" if row.kind == "cache" else label,
            f"{1e3 * row.median_seconds:.0f}",
            f"{row.speedup:.2f}",
            f"{100 * (1 - row.full_passes / comparison.baseline.full_passes):.0f} %",
            *("" if is_baseline else _decibels(x) for x in row.metric("psnr")[::-1]),
            "" if is_baseline else f"{row.metric('ssim')[1]:.3f}",
            *((_flicker(row, is_baseline=is_baseline),) if is_video else ()),
            str(row.right),
            comparison.control_words(row),
            _decibels(comparison.control_of(row).metric("psnr")[0])
            if row.control
            else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _flicker(row: Row, *, is_baseline: bool) -> str:
    return "" if is_baseline else f"{row.metric('flicker')[1]:.2f}"


def _decibels(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f}"


def save_timelines(pipeline: TextToImagePipeline, folder: Path) -> None:
    """What each cache did, step by step, with two pictures, or with true guidance."""
    prompts = ["a red circle above a blue square", "a large yellow star"]
    for name, cache in SHOWN.items():
        is_guided = name == "fastercache"  # half of it is for guidance
        result = pipeline.generate(
            prompts[:1] if is_guided else prompts,
            negative_prompt=prompts[1] if is_guided else None,
            true_cfg_scale=1.5 if is_guided else 1.0,
            seed=2,
            cache=cache,
        )
        draw_timeline(result.report).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
