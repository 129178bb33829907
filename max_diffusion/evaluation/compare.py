"""Caches against no cache, and against fewer steps in the same time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Final

import numpy as np

from ..caches import AbstractCacheConfig
from ..checks import whole
from ..demo import check, parse_caption
from ..errors import RequestError
from ..pipelines.registry import is_demo_model
from ..pipelines.text_to_image import TextToImagePipeline
from ..report import RunReport, plain
from ..types import GenerationRequest
from .drawing import (
    BASELINE,
    Drawing,
    OnProgress,
    Scenes,
    Setting,
    runnable_caches,
    scenes_of,
)
from .machine import machine
from .metrics import Lpips, psnr, ssim

_PILOTS: Final = 3
"""Pictures of each setting by which the number of fewer steps is chosen."""
_NEAR: Final = 0.1
"""How far a control's time may be from its cache's without a word."""
Times = tuple[tuple[float, ...], ...]
"""Seconds by prompt and run."""


@dataclass(frozen=True)
class Score:
    """One picture, against the same without a cache."""

    prompt: str
    seed: int
    psnr: float
    """dB; infinite where they are equal."""
    ssim: float
    """-1 to 1."""
    lpips: float | None
    """Where a network was given."""
    is_right: bool | None
    """Whether it shows its prompt, where that can be told: the demo model's scenes."""
    why_not: str
    """Empty where it does, or where that cannot be told."""


@dataclass(frozen=True)
class Row:
    """One setting over all prompts."""

    kind: str
    """``baseline``, ``cache`` or ``fewer steps``."""
    setting: Setting
    control: str | None
    """Of a cache: the label of the row with fewer steps in the same time."""
    first_seconds: float
    """The first picture, which is in none of the other figures."""
    seconds: Times
    """Whole pictures, text encoders and decoder included."""
    denoise_seconds: Times
    """Of these the denoising."""
    speedup: float
    """How many times as long the baseline takes, by medians."""
    scores: tuple[Score, ...]
    """By prompt."""
    reports: tuple[RunReport, ...] = field(repr=False)
    """By prompt."""
    images: np.ndarray = field(repr=False)
    """uint8 ``(P, H, W, 3)``: the first prompts' pictures."""

    @property
    def label(self) -> str:
        """Of its setting."""
        return self.setting.label

    @property
    def median_seconds(self) -> float:
        """Of whole pictures."""
        return median(self.seconds)

    @property
    def full_passes(self) -> float:
        """Transformer passes computed of a picture: mean over prompts."""
        return statistics.fmean(report.full_passes for report in self.reports)

    @property
    def cache_bytes(self) -> int:
        """Most bytes of cache state held at once."""
        return max(report.cache_bytes for report in self.reports)

    @property
    def right(self) -> int | None:
        """Pictures that show their prompt, of those where that can be told."""
        known = [s.is_right for s in self.scores if s.is_right is not None]
        return sum(known) if known else None

    def metric(self, name: str) -> tuple[float, float]:
        """Median and worst over prompts of ``psnr``, ``ssim`` or ``lpips``.

        Of an even number the median is the worse of the two in the middle: between a
        PSNR and an infinite one there is no mean.
        """
        values = [vars(score)[name] for score in self.scores]
        if name == "lpips":
            return statistics.median_high(values), max(values)
        return statistics.median_low(values), min(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not finite becomes ``None``."""
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
    """What :func:`compare` found."""

    model: str
    device: str
    dtype: str
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_inference_steps: int
    runs: int
    prompts: tuple[str, ...]
    num_judged: int
    """Prompts whose pictures can be told right or wrong."""
    rows: tuple[Row, ...]
    """The baseline, then each cache, then the fewer steps, most first."""
    refused: Mapping[str, str]
    """Caches that the model cannot run, and why."""
    machine: Mapping[str, object]
    versions: Mapping[str, str]

    @property
    def baseline(self) -> Row:
        """The row without a cache."""
        return self.rows[0]

    def of_kind(self, kind: str) -> tuple[Row, ...]:
        """Rows that are ``cache``, say."""
        return tuple(row for row in self.rows if row.kind == kind)

    def control_of(self, row: Row) -> Row:
        """The row of fewer steps that a cache is to be better than."""
        return next(other for other in self.rows if other.label == row.control)

    def control_words(self, row: Row) -> str:
        """Its label, and how much of the cache's time it took if that is not near."""
        if row.control is None:
            return ""
        share = self.control_of(row).median_seconds / row.median_seconds
        if abs(share - 1) <= _NEAR:
            return row.control
        return f"{row.control} ({100 * share:.0f} %)"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        own: dict[str, Any] = plain({**vars(self), "rows": ()})
        return {**own, "rows": [row.to_dict() for row in self.rows]}


def compare(
    pipeline: TextToImagePipeline,
    prompts: str | Sequence[str],
    caches: Sequence[str | AbstractCacheConfig] | None = None,
    *,
    num_inference_steps: int | None = None,
    fewer_steps: Sequence[int] = (),
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    runs: int = 3,
    lpips: Lpips | None = None,
    num_images: int = 6,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Draws every prompt without a cache, with each cache, and with fewer steps.

    A cache is worth its trouble where it is closer to the uncached picture than as many
    uncached steps as take the same time, so each gets such a control. All settings are
    drawn in turn, prompt by prompt and run by run, so that what else the machine does
    meets all alike.

    Args:
        pipeline: What draws.
        prompts: One or several, each drawn alone.
        caches: Names or configurations; default all that the pipeline can run.
        num_inference_steps: Denoising steps; default the model's.
        fewer_steps: Further numbers of steps to draw without a cache.
        guidance_scale: Input of a guidance-distilled model.
        height: Pixels; default the model's.
        width: Likewise.
        seed: Of the first prompt's noise; the next has the next.
        runs: How often each is timed.
        lpips: A further metric.
        num_images: Prompts whose pictures are kept, the first.
        on_progress: See :data:`OnProgress`; what it raises ends the comparison.

    Raises:
        RequestError: A value is missing, malformed or out of range, or the pipeline
            cannot run a cache that was named.
    """
    steps = num_inference_steps
    if steps is None:
        steps = pipeline.default_num_inference_steps
    scenes = scenes_of(
        prompts,
        steps,
        seed=seed,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )
    whole("compare: runs", runs, minimum=1, maximum=1000)
    whole("compare: num_images", num_images, minimum=1)
    configs, refused = runnable_caches(pipeline, caches, steps)
    baseline = Setting.without_cache(steps, BASELINE)
    settings = [baseline, *(Setting.with_cache(config, steps) for config in configs)]
    if isinstance(fewer_steps, str) or not isinstance(fewer_steps, Sequence):
        raise RequestError(
            f"compare: fewer_steps must be a sequence of numbers, got {fewer_steps!r}"
        )
    asked = {
        whole("compare: fewer_steps", count, minimum=1, maximum=steps - 1)
        for count in fewer_steps
    }
    drawing = Drawing(pipeline, on_progress)
    drawing.check(settings, scenes)
    if lpips is not None:
        default_height, default_width = pipeline.default_size
        blank = np.zeros((height or default_height, width or default_width, 3), "uint8")
        lpips(blank, blank)  # a network for other pictures is told now
    most = 2 * len(settings) + len(asked)  # of settings, controls included
    drawing.planned = (1 + _PILOTS) * most + runs * len(scenes) * most
    first, controls = _first(drawing, settings, scenes)
    settings += [
        Setting.without_cache(count)
        for count in sorted({*asked, *controls.values()} - {steps}, reverse=True)
    ]
    for setting in settings[len(first) :]:
        result = drawing.draw(setting, scenes.requests[0])
        first[setting.label] = result.report.total_seconds
    drawing.planned = drawing.num_drawn + runs * len(scenes) * len(settings)
    judge = _Judge(pipeline, scenes, lpips)
    records = _draw_in_turn(drawing, settings, scenes, runs, judge, num_images)
    rows = []
    for setting in settings:
        kind, control = "baseline" if setting is baseline else "fewer steps", None
        count = controls.get(setting.label)
        if count is not None:
            kind = "cache"
            equal = baseline if count == steps else Setting.without_cache(count)
            control = equal.label
        rows.append(
            _row(
                kind,
                control,
                first[setting.label],
                records[setting.label],
                records[BASELINE],
            )
        )
    report = rows[0].reports[0]
    return Comparison(
        model=report.model,
        device=report.device,
        dtype=report.dtype,
        height=report.height,
        width=report.width,
        num_inference_steps=steps,
        runs=runs,
        prompts=scenes.prompts,
        num_judged=judge.num_judged,
        rows=tuple(rows),
        refused=refused,
        machine=machine(),
        versions=report.versions,
    )


def median(times: Times) -> float:
    """Over all prompts and runs."""
    return statistics.median(value for row in times for value in row)


@dataclass
class _Record:
    """Everything one setting drew."""

    setting: Setting
    runs: list[list[RunReport]]
    """By prompt and run."""
    scores: list[Score] = field(default_factory=list)
    """By prompt."""
    images: list[np.ndarray] = field(default_factory=list)
    """uint8 ``(H, W, 3)``, of the first prompts."""


def _first(
    drawing: Drawing, settings: Sequence[Setting], scenes: Scenes
) -> tuple[dict[str, float], dict[str, int]]:
    """First pictures' seconds, and how many uncached steps take as long, by label."""
    first = {}
    for setting in settings:
        result = drawing.draw(setting, scenes.requests[0])
        first[setting.label] = result.report.total_seconds
    # Of several prompts: a cache may skip more of one than of another.
    taken: dict[str, dict[int, float]] = {setting.label: {} for setting in settings}
    for index in islice(cycle(range(len(scenes))), _PILOTS):
        for setting in settings:
            report = drawing.draw(setting, scenes.requests[index]).report
            known = taken[setting.label]
            # Of one prompt the shortest: what disturbs only makes it longer.
            known[index] = min(known.get(index, math.inf), report.denoise_seconds)
    seconds = {label: sum(known.values()) for label, known in taken.items()}
    steps = settings[0].num_inference_steps
    counts = {
        # A cache that saves nothing has all steps for its control.
        s.label: min(steps, max(1, round(steps * seconds[s.label] / seconds[BASELINE])))
        for s in settings[1:]
    }
    return first, counts


def _draw_in_turn(
    drawing: Drawing,
    settings: Sequence[Setting],
    scenes: Scenes,
    runs: int,
    judge: _Judge,
    num_images: int,
) -> dict[str, _Record]:
    records = {s.label: _Record(s, [[] for _ in scenes.requests]) for s in settings}
    rng = np.random.default_rng(0)
    for repeat in range(runs):
        for index, request in enumerate(scenes.requests):
            # Neighbours are not without influence on each other, so that the order
            # differs from round to round.
            order = rng.permutation(len(settings))
            pictures = {}
            for setting in (settings[place] for place in order):
                result = drawing.draw(setting, request)
                records[setting.label].runs[index].append(result.report)
                pictures[setting.label] = result.images[0]
            if repeat > 0:
                continue
            for label, picture in pictures.items():
                score = judge.score(request, picture, pictures[BASELINE])
                records[label].scores.append(score)
                if index < num_images:
                    records[label].images.append(picture)
    return records


def _row(
    kind: str,
    control: str | None,
    first_seconds: float,
    record: _Record,
    baseline: _Record,
) -> Row:
    seconds, plain_seconds = (
        tuple(tuple(r.total_seconds for r in runs) for runs in drawn.runs)
        for drawn in (record, baseline)
    )
    return Row(
        kind=kind,
        setting=record.setting,
        control=control,
        first_seconds=first_seconds,
        seconds=seconds,
        denoise_seconds=tuple(
            tuple(r.denoise_seconds for r in runs) for runs in record.runs
        ),
        speedup=median(plain_seconds) / median(seconds),
        scores=tuple(record.scores),
        reports=tuple(runs[-1] for runs in record.runs),
        images=np.stack(record.images),
    )


class _Judge:
    """Compares pictures, and tells whether they show their prompts if it can."""

    def __init__(
        self, pipeline: TextToImagePipeline, scenes: Scenes, lpips: Lpips | None
    ) -> None:
        self._lpips = lpips
        # The checker knows the demo model's size only.
        can_tell = is_demo_model(pipeline.pipeline_config.path) and all(
            size in (None, default)
            for request in scenes.requests
            for size, default in zip(
                (request.height, request.width), pipeline.default_size, strict=True
            )
        )
        self._scenes = {
            p: parse_caption(p) if can_tell else None for p in scenes.prompts
        }

    @property
    def num_judged(self) -> int:
        """Prompts whose pictures can be told right or wrong."""
        return sum(scene is not None for scene in self._scenes.values())

    def score(
        self, request: GenerationRequest, picture: np.ndarray, reference: np.ndarray
    ) -> Score:
        """One picture, uint8 ``(H, W, 3)``, against the same without a cache."""
        [prompt] = request.prompts
        scene = self._scenes[prompt]
        verdict = check(picture, scene) if scene else None
        return Score(
            prompt=prompt,
            seed=request.seed,
            psnr=psnr(picture, reference),
            ssim=ssim(picture, reference),
            lpips=self._lpips(picture, reference) if self._lpips else None,
            is_right=verdict.is_right if verdict else None,
            why_not=verdict.reason if verdict else "",
        )
