"""What a comparison of caches found: scores of images, rows of settings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..core.report import RunReport, plain
from .drawing import Setting

_NEAR: Final = 0.1
"""Share by which a control's time may differ from its cache's without a word."""
Times = tuple[tuple[float, ...], ...]
"""Seconds by prompt and run."""


@dataclass(frozen=True)
class Score:
    """How like one image is to the one that is drawn without a cache.

    The other image has the same prompt, seed and size, and all steps.
    """

    prompt: str
    """The prompt that the image was drawn for."""
    seed: int
    """Seed of the image's noise."""
    psnr: float
    """Peak signal to noise ratio in dB; infinite where the two images are equal."""
    ssim: float
    """Structural similarity, -1 to 1; 1 where the two images are equal."""
    lpips: float | None
    """Distance by the LPIPS network, 0 for equal images; ``None`` without one."""
    is_right: bool | None
    """Whether the image shows its prompt; ``None`` where no judge could tell."""
    why_not: str
    """What the judge says is wrong with the image; else empty."""


@dataclass(frozen=True)
class Row:
    """What one setting drew for all prompts, and how long it took."""

    kind: str
    """Kind of the row: ``baseline``, ``cache`` or ``fewer steps``."""
    setting: Setting
    """The cache and the number of steps."""
    control: str | None
    """Label of the row whose fewer steps take the cache's time; ``None`` unless the row
    is a cache's."""
    first_seconds: float
    """Seconds that the very first image took, which is in none of the other figures."""
    seconds: Times
    """Seconds that whole images took, text encoders and decoder included, by prompt and
    run."""
    denoise_seconds: Times
    """Seconds of these that the denoising loop took, by prompt and run."""
    speedup: float
    """How many times as long the baseline's images take: a quotient of medians."""
    scores: tuple[Score, ...]
    """How like the images of the first run are to the baseline's, one score per
    prompt."""
    reports: tuple[RunReport, ...] = field(repr=False)
    """The pipeline's reports of the last run, one per prompt."""
    images: np.ndarray = field(repr=False)
    """Images of the first prompts, uint8 ``(P, H, W, 3)``."""

    @property
    def label(self) -> str:
        """Label of the setting, by which tables and charts name the row."""
        return self.setting.label

    @property
    def median_seconds(self) -> float:
        """Seconds that a whole image takes: the median over prompts and runs."""
        return median(self.seconds)

    @property
    def full_passes(self) -> float:
        """Transformer passes computed in full per image: the mean over prompts."""
        return statistics.fmean(report.full_passes for report in self.reports)

    @property
    def cache_bytes(self) -> int:
        """Most bytes of cache state that a request of any prompt held at once."""
        return max(report.cache_bytes for report in self.reports)

    @property
    def right(self) -> int | None:
        """Number of images that show their prompt; ``None`` if none was judged."""
        known = [s.is_right for s in self.scores if s.is_right is not None]
        return sum(known) if known else None

    @property
    def num_judged(self) -> int:
        """Number of images that the judge could tell right from wrong."""
        return sum(score.is_right is not None for score in self.scores)

    def metric(self, name: str) -> tuple[float, float]:
        """Returns the median and the worst of ``psnr``, ``ssim`` or ``lpips``.

        Both are over the prompts. Of an even number the median is the worse of the two
        in the middle: between a PSNR and an infinite one there is no mean.
        """
        values = [vars(score)[name] for score in self.scores]
        if name == "lpips":
            return statistics.median_high(values), max(values)
        return statistics.median_low(values), min(values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the row in JSON's types; what is not finite becomes ``None``."""
        metrics: dict[str, float] = {}
        for name in ("psnr", "ssim", "lpips"):
            if vars(self.scores[0])[name] is not None:
                metrics[f"{name}_median"], metrics[f"{name}_worst"] = self.metric(name)
        found: dict[str, Any] = plain(
            {
                "kind": self.kind,
                **self.setting.to_dict(),
                "control": self.control,
                "median_seconds": self.median_seconds,
                "median_denoise_seconds": median(self.denoise_seconds),
                "first_seconds": self.first_seconds,
                "speedup": self.speedup,
                "full_passes": self.full_passes,
                "total_passes": self.reports[0].total_passes,
                "cache_bytes": self.cache_bytes,
                "right": self.right,
                "equal_pictures": sum(bool(np.isinf(s.psnr)) for s in self.scores),
                **metrics,
                "scores": self.scores,
                "seconds": self.seconds,
                "denoise_seconds": self.denoise_seconds,
                "first_prompt_steps": self.reports[0].steps,
            }
        )
        return found


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found: a row per setting, and how it was measured."""

    model: str
    """The model as it was asked for: ``demo``, a folder or a repo id."""
    device: str
    """Kind of device that drew: ``cpu`` or ``gpu``."""
    dtype: str
    """Compute dtype of the transformer."""
    height: int
    """Height of the images in pixels."""
    width: int
    """Width of the images in pixels."""
    num_inference_steps: int
    """Denoising steps of the baseline and of every cache."""
    runs: int
    """How often each image was drawn and timed."""
    prompts: tuple[str, ...]
    """The prompts that were drawn, each alone."""
    num_judged: int
    """Number of prompts for which the judge could tell of some image."""
    rows: tuple[Row, ...]
    """Rows of the baseline, then each cache, then the fewer steps, most first."""
    refused: Mapping[str, str]
    """Why the model cannot run each cache that was left out, by the cache's name."""
    machine: Mapping[str, object]
    """Processor, cores, memory and system of the machine that measured."""
    versions: Mapping[str, str]
    """Versions of the packages that drew, by name."""

    @property
    def baseline(self) -> Row:
        """The row without a cache, with all steps."""
        return self.rows[0]

    def of_kind(self, kind: str) -> tuple[Row, ...]:
        """Returns the rows of a kind: ``baseline``, ``cache`` or ``fewer steps``."""
        return tuple(row for row in self.rows if row.kind == kind)

    def control_of(self, row: Row) -> Row:
        """Returns the row of fewer steps that a cache is to be better than."""
        return next(other for other in self.rows if other.label == row.control)

    def control_words(self, row: Row) -> str:
        """Returns the control's label, with its share of the cache's time if not near.

        Empty for a row that is no cache's.
        """
        if row.control is None:
            return ""
        share = self.control_of(row).median_seconds / row.median_seconds
        if abs(share - 1) <= _NEAR:
            return row.control
        return f"{row.control} ({100 * share:.0f} %)"

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison in JSON's types, without the images."""
        own: dict[str, Any] = plain({**vars(self), "rows": ()})
        return {**own, "rows": [row.to_dict() for row in self.rows]}


def median(times: Times) -> float:
    """Returns the median over all prompts and runs, in seconds."""
    return statistics.median(value for row in times for value in row)
