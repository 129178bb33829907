"""The search: settings far apart, then the neighbours of the best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from ..caches import AbstractCacheConfig
from ..errors import RequestError
from ..pipelines.text_to_image import TextToImagePipeline
from .drawing import BASELINE, Drawing, OnProgress, Scenes, Setting, noun_of
from .metrics import by_frame, psnr
from .search_space import coarse, neighbours, tunable_caches
from .target import Target, Trial

# More than this slower than the fastest is beyond what timing one image can err.
_SLOWER: Final = 1.25
_REFINED: Final = 2  # settings whose neighbours are tried in a round
_FEWER_STEPS: Final = (0.7, 0.5, 0.35, 0.25, 0.15)


class Search:
    """Tries settings, and holds what each has reached so far.

    Args:
        pipeline: The pipeline that draws.
        target: The target to be reached.
        scenes: Prompts that every setting is drawn for.
        steps: Number of denoising steps of every setting.
        budget_seconds: Seconds after which no more settings are tried.
        on_progress: Is told the share of the time that is used.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        target: Target,
        scenes: Scenes,
        steps: int,
        budget_seconds: float,
        on_progress: OnProgress | None,
    ) -> None:
        self.fewer_steps: list[Trial] = []
        """What smaller numbers of steps reach without a cache, most steps first."""
        self.is_finished = False
        """Whether all neighbours of the best were tried before the time was over."""
        self._started = time.perf_counter()
        self._pipeline = pipeline
        self._target = target
        self._scenes = scenes
        self._steps = steps
        self._steps_run = scenes.steps_run(pipeline, steps)
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
        """Seconds that a whole image takes without a cache: the median over prompts."""
        return self._baseline.median_seconds

    @property
    def seconds(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self._started

    def first_settings(self, methods: Sequence[str] | None) -> dict[str, str]:
        """Collects the settings to start from.

        Args:
            methods: Names of caches; ``None`` for all that can be tuned.

        Returns:
            Why each cache that nobody named cannot be run, by name.

        Raises:
            RequestError: A cache that was named cannot be tuned or run, or none can.
        """
        refused = {}
        if isinstance(methods, str) or (methods is not None and not methods):
            raise RequestError(f"tune: expected names of caches, got {methods!r}")
        for name in dict.fromkeys(methods or tunable_caches()):
            try:
                settings = coarse(name)
                self._pipeline.caches.bind(settings[0], self._steps_run)
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
        """Returns whether the time for the search is used up."""
        return self._share() >= 1

    def ranked(self) -> list[Trial]:
        """Returns the settings drawn for all prompts, the best first."""
        done = [t for t in self._trials.values() if self._is_complete(t)]
        return sorted(done, key=self._rank, reverse=True)

    def unfinished(self) -> list[Trial]:
        """Returns the settings that were given up, the best first."""
        left = [t for t in self._trials.values() if not self._is_complete(t)]
        return sorted(left, key=self._rank, reverse=True)

    def _share(self) -> float:
        return self.seconds / self._budget

    def _rank(self, trial: Trial) -> tuple[bool, bool, float, float]:
        return trial.rank(self._target)

    def _promise(self, trial: Trial) -> tuple[float, ...]:
        """Returns a key like the rank, also for settings given up after few images.

        The fewer images, the better the worst of them looks: where a setting is
        given up at its first image below the target, those before it count first.
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
            self._pipeline.caches.bind(cache, self._steps_run)
        except RequestError:
            return False
        return True

    def _draw_baseline(self) -> None:
        """Draws all scenes without a cache, with all steps and with fewer."""
        first, *_ = self._scenes.requests
        self._drawing.draw(self._baseline.setting, first)  # its first is not timed
        for request in self._scenes.requests:
            result = self._drawing.draw(self._baseline.setting, request)
            self._references.append(result.frames[0])
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
        """Draws a first image of each setting; then the most promising to the end."""
        alive = []
        for cache in caches:
            if self.is_over() and self._trials:
                break
            trial = Trial(Setting.with_cache(cache, self._steps))
            if type(cache) not in {type(known) for known in self._trials}:
                # A method's first image is not timed.
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
        """Draws a setting for its next prompt."""
        index = len(trial.psnrs)
        result = self._drawing.draw(trial.setting, self._scenes.requests[index])
        seconds = result.report.total_seconds
        psnrs = by_frame(psnr, result.frames[0], self._references[index])
        trial.psnrs.append(min(psnrs))
        trial.seconds.append(seconds)
        trial.speedups.append(self._baseline.seconds[index] / seconds)
        trial.skipped += result.report.total_passes - result.report.full_passes

    def _why_hopeless(self, trial: Trial, best: Trial | None) -> str:
        """Returns why a setting cannot win with any other prompts; empty if it can."""
        target, noun = self._target, noun_of(len(self._references[0]))
        rival = best if best and best.meets(target) else None
        if target.psnr is not None:
            if trial.worst_psnr < target.psnr:
                return f"a {noun} at {trial.worst_psnr:.1f} dB"
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
            return f"a {noun} at {trial.worst_psnr:.1f} dB, no better than the best"
        return ""
