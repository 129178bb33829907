"""Every cache on the demo model, against fewer steps: a table, JSON, and a picture.

A cache is worth its trouble where it is closer to the uncached pictures than as many
steps as take the same time. Held-out prompts; PSNR and SSIM are against 50 steps
without a cache, the prompt check is the demo model's own.

    scripts/bench --only quality
    .venv/bin/python scripts/compare_caches.py --prompts 20 --output comparison
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from demo_checker import check
from demo_scenes import Scene, held_out_scene
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table

from max_diffusion import (
    CACHES,
    AutoConfig,
    CacheConfig,
    FasterCacheConfig,
    FirstBlockConfig,
    GenerationResult,
    MagCacheConfig,
    NoCacheConfig,
    PabConfig,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    TextToImagePipeline,
    demo_model_path,
    load_pipeline,
)
from max_diffusion.caches import CALIBRATION_FILE, Calibration
from max_diffusion.timeline import draw_timeline

STEPS = 50
FEWER = (40, 30, 25, 20, 15, 12, 10, 8)
# The demo model's own, given so that the bar for the fit does not refuse them.
COEFFICIENTS = Calibration.read(
    demo_model_path() / CALIBRATION_FILE
).teacache_coefficients
MODULES = tuple(TaylorSeerConfig(target=target) for target in ("attention", "modules"))
COMPARED: tuple[CacheConfig, ...] = (
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

# What docs/caches.md shows of each.
SHOWN: dict[str, CacheConfig] = {
    "taylorseer": TaylorSeerConfig(),
    "auto": AutoConfig(0.1),
    "step-mask": StepMaskConfig(compute_steps="fast"),
    "first-block": FirstBlockConfig(0.1, tail_order=1),
    "magcache": MagCacheConfig(),
    "teacache": TeaCacheConfig(0.2, COEFFICIENTS),
    "pab": PabConfig(),
    "fastercache": FasterCacheConfig(),
}


@dataclass(frozen=True)
class Row:
    """One configuration over all prompts."""

    name: str
    steps: int
    milliseconds: float
    """Median of a picture's denoising."""
    saved: float
    """Share of 50 full passes that was not run, 0 to 1."""
    psnr_worst: float
    psnr_median: float
    ssim_worst: float
    ssim_median: float
    right: int
    """Pictures that show their prompt."""


def main() -> None:
    """Draws, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--output", type=Path, help="folder for JSON and pictures")
    args = parser.parse_args()
    pipeline = load_pipeline("demo", device="cpu", caches=(*CACHES, *MODULES))
    rows = compare(pipeline, args.prompts)
    Console(width=150).print(_table(rows, args.prompts))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(row) for row in rows], indent=1)
        (args.output / "caches.json").write_text(text + "\n")
        draw(rows).save(args.output / "caches.png")
        save_timelines(pipeline, args.output)


def compare(pipeline: TextToImagePipeline, num_prompts: int) -> list[Row]:
    """One row a configuration; the first is without a cache."""
    rng = np.random.default_rng(11)
    scenes = [held_out_scene(rng) for _ in range(num_prompts)]
    runs: list[tuple[str, CacheConfig, int]] = [("no cache", NoCacheConfig(), STEPS)]
    runs += [(f"{n} steps", NoCacheConfig(), n) for n in FEWER]
    runs += [(label(cache), cache, STEPS) for cache in COMPARED]
    results: list[list[GenerationResult]] = [[] for _ in runs]
    # Configurations in turn, so that what else the machine does meets all alike.
    for index, scene in enumerate(track(scenes, "comparing")):
        for (_, cache, steps), found in zip(runs, results, strict=True):
            found.append(
                pipeline.generate(
                    scene.caption, seed=index, num_inference_steps=steps, cache=cache
                )
            )
    plain = [result.images[0] for result in results[0]]
    return [
        _row(name, steps, found, scenes, plain)
        for (name, _, steps), found in zip(runs, results, strict=True)
    ]


def _row(
    name: str,
    steps: int,
    results: Sequence[GenerationResult],
    scenes: Sequence[Scene],
    plain: Sequence[np.ndarray],
) -> Row:
    """One configuration's pictures against those without a cache."""
    pictures = [result.images[0] for result in results]
    psnrs = [psnr(x, y) for x, y in zip(pictures, plain, strict=True)]
    ssims = [ssim(x, y) for x, y in zip(pictures, plain, strict=True)]
    full = sum(result.report.full_passes for result in results)
    verdicts = [check(x, s) for x, s in zip(pictures, scenes, strict=True)]
    return Row(
        name=name,
        steps=steps,
        milliseconds=statistics.median(
            result.report.denoise_seconds * 1e3 for result in results
        ),
        saved=1 - full / (STEPS * len(scenes)),
        psnr_worst=min(psnrs),
        psnr_median=statistics.median(psnrs),
        ssim_worst=min(ssims),
        ssim_median=statistics.median(ssims),
        right=sum(verdict.is_right for verdict in verdicts),
    )


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


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures, dB."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures: the mean over pixels and channels.

    Wang et al., 2004: an 11 x 11 Gaussian window of sigma 1.5, only where it fits.
    """
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def smooth(x: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            views = np.lib.stride_tricks.sliding_window_view(x, 11, axis)
            x = views @ window
        return x

    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x = smooth(x * x) - mean_x**2
    variance_y = smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    means = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(
        (means * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()
    )


def label(cache: CacheConfig) -> str:
    """A configuration's name and what differs from its defaults."""
    name = next(name for name, kind in CACHES.items() if kind is type(cache))
    defaults = vars(type(cache)())
    changed = [
        f"{key}={value}"
        for key, value in vars(cache).items()
        if (value != defaults[key] and key != "coefficients") or value == "newton"
    ]
    return " ".join([name, *changed])


def _table(rows: Sequence[Row], num_prompts: int) -> Table:
    table = Table("cache", "ms", "passes saved", title=f"{num_prompts} prompts")
    for name in ("PSNR worst", "median", "SSIM worst", "median", "right"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.milliseconds:.0f}",
            f"{100 * row.saved:.0f} %",
            f"{row.psnr_worst:.1f}",
            f"{row.psnr_median:.1f}",
            f"{row.ssim_worst:.4f}",
            f"{row.ssim_median:.4f}",
            str(row.right),
        )
    return table


# The picture.

_SIZE, _LEFT, _TOP, _RIGHT, _BOTTOM = (1280, 760), 90, 96, 40, 90
# Colours and marks that people with any colour vision tell apart.
_STYLES: dict[str, tuple[str, str]] = {
    "taylorseer": ("#2456c8", "circle"),
    "auto": ("#d1495b", "square"),
    "step-mask": ("#f2b134", "triangle"),
    "first-block": ("#2a9d6f", "circle"),
    "magcache": ("#7b4fa3", "square"),
    "teacache": ("#8c6d46", "triangle"),
    "pab": ("#3fb5c4", "circle"),
    "fastercache": ("#6b7384", "square"),
}


def draw(rows: Sequence[Row]) -> Image.Image:
    """Median PSNR over time, with the line of fewer steps to be above of."""
    image = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(16), ImageFont.load_default(14)
    shown = [row for row in rows if np.isfinite(row.psnr_median)]
    longest = max(row.milliseconds for row in rows)
    low = min(row.psnr_median for row in shown) - 2
    high = max(row.psnr_median for row in shown) + 2

    def place(milliseconds: float, decibels: float) -> tuple[float, float]:
        width, height = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _TOP - _BOTTOM
        x = _LEFT + width * milliseconds / longest
        return x, _TOP + height * (high - decibels) / (high - low)

    title = "Demo model: likeness to 50 uncached steps, and the time it takes"
    pen.text((_LEFT, 24), title, "#1d2433", ImageFont.load_default(24))
    for decibels in range(int(np.ceil(low / 10)) * 10, int(high) + 1, 10):
        y = place(0, decibels)[1]
        pen.line((_LEFT, y, _SIZE[0] - _RIGHT, y), "#d9dde5")
        pen.text((_LEFT - 10, y), f"{decibels} dB", "#6b7384", small, "rm")
    for milliseconds in range(0, int(longest) + 1, 50):
        x, y = place(milliseconds, low)
        pen.line((x, y, x, y + 6), "#6b7384")
        pen.text((x, y + 10), f"{milliseconds} ms", "#6b7384", small, "ma")
    line = sorted(
        place(row.milliseconds, row.psnr_median) for row in shown if row.steps < STEPS
    )
    pen.line(line, "#1d2433", 2)
    pen.text(line[-1], "  fewer steps", "#1d2433", font, "lm")
    for row in shown:
        if row.steps == STEPS:
            _mark(pen, place(row.milliseconds, row.psnr_median), row.name.split()[0])
    x = float(_LEFT)
    for name in _STYLES:
        _mark(pen, (x + 8, _TOP - 22), name)
        pen.text((x + 22, _TOP - 22), name, "#1d2433", small, "lm")
        x += 44 + small.getlength(name)
    return image


def _mark(pen: ImageDraw.ImageDraw, at: tuple[float, float], name: str) -> None:
    colour, shape = _STYLES[name]
    x, y = at
    marks: dict[str, Callable[[], None]] = {
        "circle": lambda: pen.ellipse((x - 6, y - 6, x + 6, y + 6), colour),
        "square": lambda: pen.rectangle((x - 5, y - 5, x + 5, y + 5), colour),
        "triangle": lambda: pen.polygon(
            [(x, y - 7), (x + 7, y + 5), (x - 7, y + 5)], colour
        ),
    }
    marks[shape]()


if __name__ == "__main__":
    main()
