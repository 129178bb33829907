"""What a comparison of caches found: scores of pictures, rows of settings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Final

import numpy as np

from ..core.pictures import PictureInputs
from ..core.report import RunReport, plain
from ..pipelines.outputs import images_of
from .drawing import Setting, noun_of
from .metrics import mean_psnr

_NEAR: Final = 0.1
"""Share by which a control's time may differ from its cache's without a word."""
_LESS_IS_BETTER: Final = ("lpips", "mean_lpips", "flicker")
Times = tuple[tuple[float, ...], ...]
"""Seconds by prompt and run."""


@dataclass(frozen=True)
class Score:
    """How like one image or video is to the one that is drawn without a cache.

    The other one has the same prompt, seed and size, and all steps.
    """

    prompt: str
    """The prompt that it was drawn for."""
    seed: int
    """Seed of its noise."""
    by_frame: Mapping[str, tuple[float, ...]]
    """Values of each frame, of which an image is one, by the metric's name: ``psnr``,
    ``ssim`` and, with a network, ``lpips``."""
    flicker: float
    """How much it changes otherwise from frame to frame, in levels of 255; 0 of an
    image. See :func:`~max_diffusion.evaluation.flicker`."""
    is_right: bool | None
    """Whether it shows its prompt; ``None`` where no judge could tell."""
    why_not: str
    """What the judge says is wrong with it; else empty."""

    @property
    def psnr(self) -> float:
        """Peak signal to noise ratio of the worst frame in dB; infinite if equal."""
        return self._worst("psnr")

    @property
    def ssim(self) -> float:
        """Structural similarity of the worst frame, -1 to 1; 1 where all are equal."""
        return self._worst("ssim")

    @property
    def lpips(self) -> float | None:
        """Distance of the worst frame by the LPIPS network; ``None`` without one."""
        return self._worst("lpips") if "lpips" in self.by_frame else None

    @property
    def num_frames(self) -> int:
        """Number of frames; 1 of an image."""
        return len(self.by_frame["psnr"])

    @property
    def metrics(self) -> dict[str, float]:
        """The worst frame's values by name; of a video then the means, and the flicker.

        A mean PSNR is that of the mean squared error, see
        :func:`~max_diffusion.evaluation.metrics.mean_psnr`.
        """
        found = {name: self._worst(name) for name in self.by_frame}
        if self.num_frames > 1:
            for name, values in self.by_frame.items():
                mean = mean_psnr if name == "psnr" else statistics.fmean
                found[f"mean_{name}"] = mean(values)
            found["flicker"] = self.flicker
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the score in JSON's types; what is not finite becomes ``None``."""
        found: dict[str, Any] = plain(
            {
                "prompt": self.prompt,
                "seed": self.seed,
                **dict.fromkeys(("psnr", "ssim", "lpips")),
                **self.metrics,
                "is_right": self.is_right,
                "why_not": self.why_not,
            }
        )
        if self.num_frames > 1:
            found["by_frame"] = plain(self.by_frame)
        return found

    def _worst(self, name: str) -> float:
        values = self.by_frame[name]
        return max(values) if name in _LESS_IS_BETTER else min(values)


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
    """Seconds that the very first image or video took, which is in none of the other
    figures."""
    seconds: Times
    """Seconds that whole images or videos took, text encoders and decoder included, by
    prompt and run."""
    denoise_seconds: Times
    """Seconds of these that the denoising loop took, by prompt and run."""
    speedup: float
    """How many times as long the baseline's images take: a quotient of medians."""
    scores: tuple[Score, ...]
    """How like what the first run drew is to the baseline's, one score per prompt."""
    reports: tuple[RunReport, ...] = field(repr=False)
    """The pipeline's reports of the last run, one per prompt."""
    frames: np.ndarray = field(repr=False)
    """What is shown of the first prompts, uint8 ``(P, K, H, W, 3)``: images, as one
    frame each, or of videos the frames of :func:`shown_frames`."""

    @property
    def images(self) -> np.ndarray:
        """Images of the first prompts, uint8 ``(P, H, W, 3)``.

        Raises:
            MaxDiffusionError: They are videos.
        """
        return images_of(self.frames)

    @property
    def label(self) -> str:
        """Label of the setting, by which tables and charts name the row."""
        return self.setting.label

    @property
    def median_seconds(self) -> float:
        """Seconds that a whole image or video takes: median over prompts and runs."""
        return median(self.seconds)

    @property
    def full_passes(self) -> float:
        """Transformer passes computed in full per prompt: the mean over prompts."""
        return statistics.fmean(report.full_passes for report in self.reports)

    @property
    def cache_bytes(self) -> int:
        """Most bytes of cache state that a request of any prompt held at once."""
        return max(report.cache_bytes for report in self.reports)

    @property
    def right(self) -> int | None:
        """Number of prompts that are shown; ``None`` if none was judged."""
        known = [s.is_right for s in self.scores if s.is_right is not None]
        return sum(known) if known else None

    @property
    def num_judged(self) -> int:
        """Number of prompts of which the judge could tell right from wrong."""
        return sum(score.is_right is not None for score in self.scores)

    def metric(self, name: str) -> tuple[float, float]:
        """Returns the median and the worst of one of the scores' :attr:`Score.metrics`.

        Both are over the prompts. Of an even number the median is the worse of the two
        in the middle: between a PSNR and an infinite one there is no mean.
        """
        values = [score.metrics[name] for score in self.scores]
        if name in _LESS_IS_BETTER:
            return statistics.median_high(values), max(values)
        return statistics.median_low(values), min(values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the row in JSON's types; what is not finite becomes ``None``."""
        metrics: dict[str, float] = {}
        for name in self.scores[0].metrics:
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
                "scores": [score.to_dict() for score in self.scores],
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
    num_frames: int
    """Number of frames that were drawn for each prompt; 1 of images."""
    fps: float | None
    """Frames a second of videos; ``None`` of images."""
    inputs: PictureInputs | None = field(repr=False)
    """The pictures that every prompt started from; ``None`` without any."""
    strength: float | None
    """How much of the schedule was run from the picture; ``None`` without one, or where
    all of it is."""
    loras: Mapping[str, float]
    """Weight of each LoRA that all was drawn with, as the runs' reports have them."""
    options: Mapping[str, object]
    """What was asked for of the options that only some models have, by name."""
    num_inference_steps: int
    """Denoising steps of the baseline and of every cache; of the whole schedule, like
    all numbers of steps here, where a picture takes the place of the first."""
    runs: int
    """How often each image or video was drawn and timed."""
    prompts: tuple[str, ...]
    """The prompts that were drawn, each alone."""
    num_judged: int
    """Number of prompts for which the judge could tell of some row."""
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

    @property
    def is_video(self) -> bool:
        """Whether videos were drawn."""
        return self.num_frames > 1

    @property
    def noun(self) -> str:
        """What texts call what was drawn: ``picture`` or ``video``."""
        return noun_of(self.num_frames)

    @property
    def given_words(self) -> str:
        """Words for the LoRAs and the pictures that all was drawn with; may be empty.

        Files of LoRAs are named without their folders.
        """
        names = [f"{PurePath(n).stem}:{weight:g}" for n, weight in self.loras.items()]
        words = [f"with LoRA {', '.join(names)}"] if names else []
        if self.inputs is not None:
            sizes = [f"{each.width} x {each.height}" for each in self.inputs.images]
            found = f"from a picture of {' and of '.join(sizes)} pixels"
            if self.inputs.mask is not None:
                found += " under a mask"
            if self.strength is not None:
                found += f" at strength {self.strength:g}"
                run, steps = (
                    self.baseline.reports[0].num_steps,
                    self.num_inference_steps,
                )
                if run < steps:
                    found += f", the last {run} of {steps} steps"
            words.append(found)
        return "; ".join(words)

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
        """Returns the comparison in JSON's types, without the images.

        What only videos have is left out of images', as are options, LoRAs and
        pictures where there are none. Pictures are told as in a run's report, by the
        SHA-256 of their pixels.
        """
        own: dict[str, Any] = plain({**vars(self), "rows": (), "inputs": None})
        del own["inputs"]
        if self.inputs is None:
            del own["strength"]
        else:
            mask = self.inputs.mask
            own["images"] = [image.digest for image in self.inputs.images]
            own["mask"] = None if mask is None else mask.digest
        if not self.is_video:
            del own["num_frames"], own["fps"]
        for name in ("options", "loras"):
            if not own[name]:
                del own[name]
        return {**own, "rows": [row.to_dict() for row in self.rows]}


def shown_frames(num_frames: int) -> tuple[int, ...]:
    """Returns which frames of a video are shown: the first, a middle and the last one.

    Args:
        num_frames: Number of frames, at least 1.

    Returns:
        0-based indices, ascending; of an image its only frame's.
    """
    last = num_frames - 1
    return tuple(sorted({0, last // 2, last}))


def median(times: Times) -> float:
    """Returns the median over all prompts and runs, in seconds."""
    return statistics.median(value for row in times for value in row)
