"""Draws with caches, without, and with fewer steps in the same time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING, Final

import numpy as np

from ..caches import AbstractCacheConfig, DenoisingCacheConfig
from ..core.loras import GivenLoras
from ..core.report import RunReport
from ..core.request import GenerationRequest
from ..core.validation import whole
from ..errors import RequestError
from ..pipelines.text_to_image import TextToImagePipeline
from .comparison import Comparison, Row, Score, median, shown_frames
from .drawing import (
    BASELINE,
    NO_OPTIONS,
    Drawing,
    OnProgress,
    Scenes,
    Setting,
    runnable_caches,
    scenes_of,
)
from .judging import Judge, checked_judge, judged
from .machine import machine
from .metrics import Lpips, by_frame, flicker, psnr, ssim

if TYPE_CHECKING:
    from ..media.pictures import PictureLike

_PILOTS: Final = 3
"""How often each setting is drawn to choose the number of fewer steps."""


def compare(
    pipeline: TextToImagePipeline,
    prompts: str | Sequence[str],
    caches: Sequence[str | DenoisingCacheConfig | AbstractCacheConfig] | None = None,
    *,
    num_inference_steps: int | None = None,
    fewer_steps: Sequence[int] = (),
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    image: PictureLike | Sequence[PictureLike] | None = None,
    mask: PictureLike | None = None,
    strength: float | None = None,
    loras: GivenLoras | None = None,
    options: Mapping[str, object] = NO_OPTIONS,
    runs: int = 3,
    lpips: Lpips | None = None,
    num_images: int = 6,
    judge: Judge | None = None,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Draws every prompt without a cache, with each cache, and with fewer steps.

    A cache is worth its trouble where it is closer to the uncached picture than as many
    uncached steps as take the same time, so each gets such a control. All settings are
    drawn in turn, prompt by prompt and run by run, so that what else the machine does
    meets all alike.

    Args:
        pipeline: The pipeline that draws.
        prompts: One or several, each drawn alone.
        caches: Names or configurations; default all that the pipeline can run.
        num_inference_steps: Denoising steps; default the model's.
        fewer_steps: Further numbers of steps to draw without a cache.
        guidance_scale: Input of a guidance-distilled model.
        height: Height of the images in pixels; default the model's.
        width: Width of the images in pixels; default the model's.
        seed: Seed of the first prompt's noise; each further prompt has the next.
        image: Picture that all prompts start from, see
            :meth:`~max_diffusion.TextToImagePipeline.generate`; several for models that
            take them.
        mask: What of it is drawn anew.
        strength: How much of the schedule is run from it. Numbers of steps are of the
            whole schedule, of which it leaves the same share to every setting.
        loras: LoRAs of those that the pipeline was given as ``adapters``, by name.
        options: What only some models have, by the names that the model's
            ``options_class`` declares: ``num_frames`` of CogVideoX.
        runs: How often each image or video is drawn and timed, 1 to 1000.
        lpips: A further metric; ``None`` to do without.
        num_images: How many prompts' images or videos are kept to be shown, the first
            ones; at least 1.
        judge: Tells whether an image or video shows its prompt; without one nothing
            does. The demo models', one for images and videos, is
            :func:`max_diffusion.demo.judge`.
        on_progress: Is told how far it is, see :data:`OnProgress`; what it raises ends
            the comparison.

    Returns:
        The comparison: a row for the baseline, for each cache and each smaller number
        of steps.

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
        image=image,
        mask=mask,
        strength=strength,
        loras=loras,
        options=options,
    )
    whole("compare: runs", runs, minimum=1, maximum=1000)
    whole("compare: num_images", num_images, minimum=1)
    checked_judge("compare", judge)
    configs, refused = runnable_caches(
        pipeline, caches, scenes.steps_run(pipeline, steps)
    )
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
    context, *_ = drawing.check(settings, scenes)
    if lpips is not None:
        blank = np.zeros((context.height, context.width, 3), "uint8")
        lpips(blank, blank)  # a network for other images is told now
    most = 2 * len(settings) + len(asked)  # of settings, controls included
    drawing.planned = (1 + _PILOTS) * most + runs * len(scenes) * most
    first, shares = _first(drawing, settings, scenes)
    run = [scenes.steps_run(pipeline, count) for count in range(1, steps + 1)]
    controls = {label: _fewer(run, share) for label, share in shares.items()}
    settings += [
        Setting.without_cache(count)
        for count in sorted({*asked, *controls.values()} - {steps}, reverse=True)
    ]
    for setting in settings[len(first) :]:
        result = drawing.draw(setting, scenes.requests[0])
        first[setting.label] = result.report.total_seconds
    drawing.planned = drawing.num_drawn + runs * len(scenes) * len(settings)
    scorer = _Scorer(lpips, judge)
    records = _draw_in_turn(drawing, settings, scenes, runs, scorer, num_images)
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
        num_frames=rows[0].scores[0].num_frames,
        fps=records[BASELINE].fps,
        inputs=scenes.inputs,
        strength=report.strength,
        loras=report.loras,
        options=options,
        num_inference_steps=steps,
        runs=runs,
        prompts=scenes.prompts,
        num_judged=sum(
            any(row.scores[index].is_right is not None for row in rows)
            for index in range(len(scenes))
        ),
        rows=tuple(rows),
        refused=refused,
        machine=machine(),
        versions=report.versions,
    )


@dataclass
class _Record:
    """Reports, scores and frames of what one setting drew."""

    setting: Setting
    runs: list[list[RunReport]]
    """Reports of the runs, by prompt and run."""
    scores: list[Score] = field(default_factory=list)
    """Scores of what the first run drew, by prompt."""
    frames: list[np.ndarray] = field(default_factory=list)
    """What is shown of the first prompts, uint8 ``(K, H, W, 3)`` each."""
    fps: float | None = None
    """Frames a second of videos."""


def _first(
    drawing: Drawing, settings: Sequence[Setting], scenes: Scenes
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns, by label, the first's seconds and the share of the uncached time."""
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
    return first, {s.label: seconds[s.label] / seconds[BASELINE] for s in settings[1:]}


def _fewer(run: Sequence[int], share: float) -> int:
    """Returns the uncached steps that take a share of the time of all of them.

    A cache that saves nothing has all steps for its control.

    Args:
        run: How many are run of 1 step, of 2 and so on: all, or what a picture leaves.
        share: Of the time.
    """
    wanted = max(1, round(run[-1] * share))
    counts = range(1, len(run) + 1)
    # Of those that run as many the one that begins at the noise that all steps do.
    return min(
        counts, key=lambda n: (abs(run[n - 1] - wanted), abs(n - len(run) * share))
    )


def _draw_in_turn(
    drawing: Drawing,
    settings: Sequence[Setting],
    scenes: Scenes,
    runs: int,
    scorer: _Scorer,
    num_images: int,
) -> dict[str, _Record]:
    records = {s.label: _Record(s, [[] for _ in scenes.requests]) for s in settings}
    rng = np.random.default_rng(0)
    for repeat in range(runs):
        for index, request in enumerate(scenes.requests):
            # Neighbours are not without influence on each other, so that the order
            # differs from round to round.
            order = rng.permutation(len(settings))
            drawn = {}
            for setting in (settings[place] for place in order):
                result = drawing.draw(setting, request)
                records[setting.label].runs[index].append(result.report)
                records[setting.label].fps = result.fps
                if repeat == 0:
                    drawn[setting.label] = result.frames[0]
            for label, frames in drawn.items():
                score = scorer.score(request, frames, drawn[BASELINE])
                records[label].scores.append(score)
                if index < num_images:
                    shown = frames[list(shown_frames(len(frames)))]
                    records[label].frames.append(shown)
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
        frames=np.stack(record.frames),
    )


@dataclass(frozen=True)
class _Scorer:
    """Compares frames, and asks the judge whether they show their prompts."""

    lpips: Lpips | None
    judge: Judge | None

    def score(
        self, request: GenerationRequest, frames: np.ndarray, reference: np.ndarray
    ) -> Score:
        """Scores one image or video, uint8 ``(F, H, W, 3)``, by the uncached one."""
        [prompt] = request.prompts
        verdict = judged(self.judge, prompt, frames) if self.judge is not None else None
        metrics = {"psnr": psnr, "ssim": ssim, "lpips": self.lpips}
        return Score(
            prompt=prompt,
            seed=request.seed,
            by_frame={
                name: by_frame(metric, frames, reference)
                for name, metric in metrics.items()
                if metric is not None
            },
            flicker=flicker(frames, reference),
            is_right=None if verdict is None else bool(verdict.is_right),
            why_not="" if verdict is None else verdict.reason,
        )
