"""Finds the cache that meets a target."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from ..caches import AbstractCacheConfig
from ..calibration import PROMPTS as PLAIN_PROMPTS
from ..demo import held_out_scene
from ..errors import RequestError
from ..pipelines.registry import is_demo_model
from ..pipelines.text_to_image import TextToImagePipeline
from ..report import plain
from .compare import Comparison, compare
from .drawing import BASELINE, Drawing, OnProgress, Scenes, Setting, scenes_of
from .machine import machine
from .metrics import psnr
from .search_space import coarse, neighbours, tunable_caches
from .target import Target, Trial

# More than this slower than the fastest is beyond what timing one picture can err.
_SLOWER: Final = 1.25
_REFINED: Final = 2  # settings whose neighbours are tried in a round
_FEWER_STEPS: Final = (0.7, 0.5, 0.35, 0.25, 0.15)
_VALIDATED: Final = 5


@dataclass(frozen=True)
class TuningResult:
    """What :func:`tune` found."""

    target: Target
    is_met: bool
    """By the winner, on prompts that it was not chosen by."""
    winner: Setting
    """The best that meets the target, or what comes nearest to it."""
    validation: Comparison
    """Winner, no cache and fewer steps in the same time, on the other prompts."""
    num_validated: int
    """Settings that were drawn for the other prompts; more than one were chosen by
    these too."""
    num_left: int
    """Further settings that meet the target on the prompts tuned on, which were not
    validated: the time was over, or five were."""
    trials: tuple[Trial, ...]
    """All settings, by rank: those drawn for all prompts first."""
    fewer_steps: tuple[Trial, ...]
    """No cache, and fewer steps."""
    baseline_seconds: float
    """Median of whole pictures without a cache."""
    prompts: tuple[str, ...]
    """Tuned on."""
    refused: Mapping[str, str]
    """Caches that the model cannot run, and why."""
    is_finished: bool
    """Whether all neighbours of the best were tried before the time was over."""
    seconds: float
    """That tuning took."""
    machine: Mapping[str, object]

    @property
    def others_words(self) -> str:
        """Which prompts the winner was validated on."""
        count = len(self.validation.prompts)
        prompts = "prompt" if count == 1 else "prompts"
        if self.num_validated == 1:
            return f"{count} {prompts} that it was not chosen by"
        return (
            f"{count} other {prompts}, by which it was chosen among the best "
            f"{self.num_validated}"
        )

    @property
    def miss_words(self) -> str:
        """What a target that is not met is told with."""
        if self.num_left:
            return (
                f"no setting that was validated reaches {self.target}; {self.num_left} "
                "more do on the prompts tuned on, a larger budget may validate them"
            )
        where = "" if self.is_finished else " tried before the time was over"
        return f"no setting{where} reaches {self.target}"

    @property
    def tuned_words(self) -> str:
        """What the winner reached on the prompts tuned on."""
        trial = next(t for t in self.trials if t.setting == self.winner)
        worst = trial.worst_psnr
        decibels = "equal pictures" if math.isinf(worst) else f"{worst:.1f} dB at worst"
        skipped = "" if trial.skipped else ", nothing skipped"
        return f"{decibels}, {trial.speedup:.2f} times as fast{skipped}"

    @property
    def nearest_words(self) -> str:
        """What the winner reached on the other prompts."""
        row = self.validation.of_kind("cache")[0]
        worst = row.metric("psnr")[1]
        decibels = "equal pictures" if math.isinf(worst) else f"{worst:.1f} dB at worst"
        return (
            f"{decibels}, {row.speedup:.2f} times as fast, {row.median_seconds:.3g} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        own: dict[str, Any] = plain(
            {
                name: value
                for name, value in vars(self).items()
                if name not in ("winner", "validation", "trials", "fewer_steps")
            }
        )
        return {
            **own,
            "winner": self.winner.to_dict(),
            "validation": self.validation.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "fewer_steps": [trial.to_dict() for trial in self.fewer_steps],
        }


def tune(
    pipeline: TextToImagePipeline,
    target: Target,
    *,
    prompts: Sequence[str] | None = None,
    validation_prompts: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    budget_seconds: float = 600.0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> TuningResult:
    """Searches methods and their options for the best that meets a target.

    From settings far apart to the neighbours of the best, until no neighbour is better
    or the time is over. Each setting is drawn prompt by prompt and given up as soon as
    it is beyond hope: a picture is below the target already, or it is clearly slower
    than another that is not. The winner is drawn again for prompts that it was not
    chosen by, beside no cache and fewer steps; where it fails there the next best is.

    Args:
        pipeline: What draws; only caches that it was compiled with are tried.
        target: What is to be reached.
        prompts: To tune on; default six held-out ones of the demo model, or four
            plain ones.
        validation_prompts: To validate on; default as many others.
        methods: Names of caches to try; default all that the pipeline can run.
        budget_seconds: When to stop searching. No cache and a first setting are drawn
            in any case; what is validated in the end takes longer.
        num_inference_steps: Denoising steps; default the model's.
        guidance_scale: Input of a guidance-distilled model.
        height: Pixels; default the model's.
        width: Likewise.
        seed: Of the first prompt's noise; the next has the next.
        on_progress: See :data:`OnProgress`; what it raises ends the search.

    Raises:
        RequestError: A value is missing, malformed or out of range, or there is no
            cache to try.
    """
    if not isinstance(target, Target):
        raise RequestError(
            f"tune: expected a Target, Target(psnr=30) say, got {target!r}"
        )
    if not isinstance(budget_seconds, int | float) or not budget_seconds > 0:
        raise RequestError(
            f"tune: budget_seconds must be a number above 0, got {budget_seconds!r}"
        )
    steps = num_inference_steps
    if steps is None:
        steps = pipeline.default_num_inference_steps
    own, others = default_prompts(pipeline)
    make_scenes = partial(
        scenes_of,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
    )
    scenes = make_scenes(own if prompts is None else prompts, seed=seed)
    if validation_prompts is None:
        validation_prompts = [text for text in others if text not in scenes.prompts]
    unseen = make_scenes(validation_prompts, seed=seed + len(scenes))
    seen = set(scenes.prompts) & set(unseen.prompts)
    if seen:
        raise RequestError(
            f"tune: {min(seen)!r} is to be tuned and validated on; give it once"
        )
    search = _Search(pipeline, target, scenes, steps, budget_seconds, on_progress)
    refused = search.first_settings(methods)
    search.run()
    ranked = search.ranked()
    chosen: tuple[Trial, Comparison] | None = None
    is_met = False
    tried = 0
    meeting = sum(trial.meets(target) for trial in ranked)
    for trial in ranked[:_VALIDATED]:
        if chosen and not trial.meets(target):
            break
        tried += 1
        validation = compare(
            pipeline,
            unseen.prompts,
            [trial.setting.cache],
            num_inference_steps=steps,
            seed=seed + len(scenes),
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            runs=2,
            on_progress=_relabelled(on_progress),
        )
        is_met = trial.meets(target) and _is_met(validation, target)
        if chosen is None or is_met or _nearer(validation, chosen[1], target):
            chosen = (trial, validation)
        if is_met or search.is_over():
            break
    assert chosen
    return TuningResult(
        target=target,
        is_met=is_met,
        winner=chosen[0].setting,
        validation=chosen[1],
        num_validated=tried,
        num_left=max(0, meeting - tried),
        trials=tuple(ranked + search.unfinished()),
        fewer_steps=tuple(search.fewer_steps),
        baseline_seconds=search.baseline_seconds,
        prompts=scenes.prompts,
        refused=refused,
        is_finished=search.is_finished,
        seconds=time.perf_counter() - search.started,
        machine=machine(),
    )


def default_prompts(
    pipeline: TextToImagePipeline,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts to tune on, and others to validate on."""
    texts: Sequence[str] = PLAIN_PROMPTS
    if is_demo_model(pipeline.pipeline_config.path):
        rng = np.random.default_rng(5)
        # Combinations that it was never trained on; each once.
        found = dict.fromkeys(held_out_scene(rng).caption for _ in range(40))
        texts = tuple(found)[:12]
    half = len(texts) // 2
    return tuple(texts[:half]), tuple(texts[half:])


class _Search:
    """What has been tried so far."""

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        target: Target,
        scenes: Scenes,
        steps: int,
        budget_seconds: float,
        on_progress: OnProgress | None,
    ) -> None:
        self.started = time.perf_counter()
        self.fewer_steps: list[Trial] = []
        self.is_finished = False
        self._pipeline = pipeline
        self._target = target
        self._scenes = scenes
        self._steps = steps
        self._budget = budget_seconds
        self._first: list[AbstractCacheConfig] = []
        self._trials: dict[AbstractCacheConfig, Trial] = {}
        self._references: list[np.ndarray] = []
        self._baseline = Trial(Setting.without_cache(steps, BASELINE))
        self._drawing = Drawing(
            pipeline,
            on_progress
            and (lambda _, label: on_progress(min(1.0, self._share()), label)),
        )

    @property
    def baseline_seconds(self) -> float:
        """Median of whole pictures without a cache."""
        return self._baseline.median_seconds

    def first_settings(self, methods: Sequence[str] | None) -> dict[str, str]:
        """Collects the settings to start from; returns which caches cannot be run."""
        refused = {}
        if isinstance(methods, str) or (methods is not None and not methods):
            raise RequestError(f"tune: expected names of caches, got {methods!r}")
        for name in dict.fromkeys(methods or tunable_caches()):
            try:
                settings = coarse(name)
                self._pipeline.caches.bind(settings[0], self._steps)
            except RequestError as err:
                if methods is not None:
                    raise
                refused[name] = str(err)
                continue
            self._first += [c for c in settings if self._can_run(c)]
        if not self._first:
            raise RequestError(
                "tune: the pipeline was compiled without any cache; give caches at load"
            )
        return refused

    def run(self) -> None:
        """Tries settings until none is left that could be better, or time is over."""
        self._drawing.check([self._baseline.setting], self._scenes)
        self._draw_baseline()
        self._race(self._first)
        while not self.is_over():
            best = sorted(self._trials.values(), key=self._promise, reverse=True)
            new = dict.fromkeys(
                cache
                for trial in best[:_REFINED]
                for cache in neighbours(trial.setting.cache)
                if cache not in self._trials and self._can_run(cache)
            )
            if not new:
                self.is_finished = True
                break
            self._race(list(new))
        if not any(trial.meets(self._target) for trial in self.ranked()):
            # None meets the target: the nearest so far are drawn to the end.
            nearest = sorted(self._trials.values(), key=self._promise, reverse=True)
            for trial in nearest[:_REFINED]:
                trial.given_up = ""
                while len(trial.psnrs) < len(self._scenes):
                    self._draw_next(trial)

    def is_over(self) -> bool:
        """Whether the time is."""
        return self._share() >= 1

    def ranked(self) -> list[Trial]:
        """Settings drawn for all prompts, the best first."""
        done = [t for t in self._trials.values() if self._is_complete(t)]
        return sorted(done, key=self._rank, reverse=True)

    def unfinished(self) -> list[Trial]:
        """Settings that were given up, the best first."""
        left = [t for t in self._trials.values() if not self._is_complete(t)]
        return sorted(left, key=self._rank, reverse=True)

    def _share(self) -> float:
        return (time.perf_counter() - self.started) / self._budget

    def _rank(self, trial: Trial) -> tuple[bool, bool, float, float]:
        return trial.rank(self._target)

    def _promise(self, trial: Trial) -> tuple[float, ...]:
        """Like the rank, also of settings that were given up after few pictures.

        The fewer pictures, the better the worst of them looks: where a setting is
        given up at its first picture below the target, those before it count first.
        """
        is_met, is_faster, *others = self._rank(trial)
        reached = 0
        if self._target.psnr is not None and not is_met:
            reached = sum(value >= self._target.psnr for value in trial.psnrs)
        return (is_met, is_faster, reached, *others)

    def _is_complete(self, trial: Trial) -> bool:
        return len(trial.psnrs) == len(self._scenes)

    def _can_run(self, cache: AbstractCacheConfig) -> bool:
        try:
            self._pipeline.caches.bind(cache, self._steps)
        except RequestError:
            return False
        return True

    def _draw_baseline(self) -> None:
        """No cache, and fewer steps."""
        first, *_ = self._scenes.requests
        self._drawing.draw(self._baseline.setting, first)  # its first is not timed
        for request in self._scenes.requests:
            result = self._drawing.draw(self._baseline.setting, request)
            self._references.append(result.images[0])
            self._baseline.psnrs.append(math.inf)
            self._baseline.seconds.append(result.report.total_seconds)
            self._baseline.speedups.append(1.0)
        counts = {max(1, round(share * self._steps)) for share in _FEWER_STEPS}
        for count in sorted(counts - {self._steps}, reverse=True):
            if self.is_over():
                break
            trial = Trial(Setting.without_cache(count))
            for _ in self._scenes.requests:
                self._draw_next(trial)
            self.fewer_steps.append(trial)

    def _race(self, caches: Iterable[AbstractCacheConfig]) -> None:
        """A first picture of each; then the most promising to the end, one by one."""
        alive = []
        for cache in caches:
            if self.is_over() and self._trials:
                break
            trial = Trial(Setting.with_cache(cache, self._steps))
            if type(cache) not in {type(known) for known in self._trials}:
                # A method's first picture is not timed.
                self._drawing.draw(trial.setting, self._scenes.requests[0])
            self._draw_next(trial)
            self._trials[cache] = trial
            alive.append(trial)
        for trial in sorted(alive, key=self._rank, reverse=True):
            best = next(iter(self.ranked()), None)
            while not self._is_complete(trial):
                trial.given_up = self._why_hopeless(trial, best)
                if not trial.given_up and self.is_over() and best:
                    trial.given_up = "the time was over"
                if trial.given_up:
                    break
                self._draw_next(trial)

    def _draw_next(self, trial: Trial) -> None:
        """A setting's next prompt."""
        index = len(trial.psnrs)
        result = self._drawing.draw(trial.setting, self._scenes.requests[index])
        seconds = result.report.total_seconds
        trial.psnrs.append(psnr(result.images[0], self._references[index]))
        trial.seconds.append(seconds)
        trial.speedups.append(self._baseline.seconds[index] / seconds)
        trial.skipped += result.report.total_passes - result.report.full_passes

    def _why_hopeless(self, trial: Trial, best: Trial | None) -> str:
        """Words if a setting cannot win, whatever the other prompts give."""
        target = self._target
        rival = best if best and best.meets(target) else None
        if target.psnr is not None:
            if trial.worst_psnr < target.psnr:
                return f"a picture at {trial.worst_psnr:.1f} dB"
            if rival and trial.speedup * _SLOWER < rival.speedup:
                return f"slower than {rival.setting.label}"
            return ""
        hopeful = Trial(
            trial.setting,
            trial.psnrs,
            [value / _SLOWER for value in trial.seconds],
            [value * _SLOWER for value in trial.speedups],
            trial.skipped,
        )
        if not hopeful.meets(target):
            return "too slow"
        if rival and (trial.worst_psnr, hopeful.speedup) <= (
            rival.worst_psnr,
            rival.speedup,
        ):
            return f"a picture at {trial.worst_psnr:.1f} dB, no better than the best"
        return ""


def _is_met(validation: Comparison, target: Target) -> bool:
    """Whether the cache of a comparison reaches a target."""
    return _validated(validation).meets(target)


def _nearer(validation: Comparison, other: Comparison, target: Target) -> bool:
    """Whether one comparison's cache comes nearer to a target than another's."""
    return _validated(validation).rank(target) > _validated(other).rank(target)


def _validated(validation: Comparison) -> Trial:
    [row] = validation.of_kind("cache")
    return Trial(
        row.setting,
        [score.psnr for score in row.scores],
        [row.median_seconds],
        [row.speedup],
        sum(r.total_passes - r.full_passes for r in row.reports),
    )


def _relabelled(on_progress: OnProgress | None) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda share, label: on_progress(share, f"validating {label}")
