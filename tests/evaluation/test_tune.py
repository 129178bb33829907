"""The search for a cache, where times and likeness are functions of the setting."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from painters import STEPS, Painter, decibels

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    AutoConfig,
    NoCacheConfig,
    RequestError,
    TeaCacheConfig,
)
from max_diffusion.evaluation import Target, TuningResult, tune, tuning_search
from max_diffusion.evaluation.calibration import PROMPTS as PLAIN_PROMPTS
from max_diffusion.evaluation.target import Trial

PROMPTS = ("a", "b", "c", "d")
UNSEEN = ("u", "v")
HARDNESS = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 4.0, "u": 3.0, "v": 1.5}
BASELINE_S = STEPS / 10


def behave(cache: AbstractCacheConfig, steps: int, prompt: str) -> tuple[float, float]:
    """Fewer steps are poor; a threshold has its price, a last step only costs time."""
    hardness = HARDNESS.get(prompt, 1.0)
    if isinstance(cache, TeaCacheConfig):
        seconds = BASELINE_S / (1 + 2 * cache.threshold) + 0.02 * cache.compute_last
        return seconds, min(0.5 + 30 * cache.threshold**2 * hardness, 60.0)
    return steps / 10, 60 * (1 - steps / STEPS)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Painter], None]]:
    """The search's time is its painter's."""
    painters: list[Painter] = []
    now = SimpleNamespace(perf_counter=lambda: painters[-1].now)
    monkeypatch.setattr(tuning_search, "time", now)
    yield painters.append


@pytest.fixture
def search(clock: Callable[[Painter], None]) -> Callable[..., TuningResult]:
    def run(
        target: Target, painter: Painter | None = None, **options: Any
    ) -> TuningResult:
        pipeline: Any = painter or Painter(behave, names=("teacache",))
        clock(pipeline)
        given: dict[str, Any] = {
            "prompts": PROMPTS,
            "validation_prompts": UNSEEN,
            "budget_seconds": 1e9,
        }
        return tune(pipeline, target, **given | options)

    return run


Search = Callable[..., TuningResult]


ALL = [
    TeaCacheConfig(threshold, compute_last=last)
    for threshold in TeaCacheConfig.ladders["threshold"]
    for last in TeaCacheConfig.ladders["compute_last"]
]


def figures(cache: AbstractCacheConfig) -> tuple[float, float]:
    """Speed-up and worst PSNR on the prompts tuned on."""
    drawn = [behave(cache, STEPS, prompt) for prompt in PROMPTS]
    return BASELINE_S / drawn[0][0], min(decibels(error) for _, error in drawn)


def trial_of(result: TuningResult) -> Trial:
    return next(t for t in result.trials if t.setting == result.winner)


# What wins.


@pytest.mark.parametrize("psnr", [40.0, 43.0, 46.0, 50.0])
def test_the_fastest_at_a_psnr_wins(search: Search, psnr: float) -> None:
    result = search(Target(psnr=psnr))
    found = [figures(cache) for cache in ALL]
    wanted = max(speed for speed, likeness in found if likeness >= psnr and speed > 1)
    assert figures(result.winner.cache)[0] == pytest.approx(wanted)
    assert trial_of(result).worst_psnr >= psnr
    assert (result.is_met, result.is_finished, result.num_validated) == (True, True, 1)


@pytest.mark.parametrize("speedup", [1.05, 1.2, 1.5, 2.0])
def test_the_most_like_at_a_speed_wins(search: Search, speedup: float) -> None:
    result = search(Target(speedup=speedup))
    in_seconds = search(Target(seconds=BASELINE_S / speedup + 1e-9))
    found = [figures(cache) for cache in ALL]
    wanted = max(likeness for speed, likeness in found if speed >= speedup - 1e-9)
    for one in (result, in_seconds):
        assert figures(one.winner.cache)[1] == pytest.approx(wanted)
        assert figures(one.winner.cache)[0] >= speedup - 1e-9
        assert one.is_met


def test_trials_are_what_was_drawn(search: Search) -> None:
    painter = Painter(behave, names=("teacache",))
    result = search(Target(psnr=43.0), painter, seed=11)
    seeds: dict[AbstractCacheConfig, list[int]] = {}
    for request in painter.drawn:
        assert request.cache is not None
        # 2 before and 4 after: of the validation.
        if request.prompts[0] in PROMPTS and request.num_inference_steps == STEPS:
            seeds.setdefault(request.cache, []).append(request.seed)
    assert seeds.pop(NoCacheConfig()) == [11, 11, 12, 13, 14]  # the first for nothing
    assert set(seeds) == {trial.setting.cache for trial in result.trials}
    assert seeds[next(iter(seeds))].pop(0) == 11  # so the first of a method
    for trial in result.trials:
        prompts = PROMPTS[: len(trial.psnrs)]
        assert seeds[trial.setting.cache] == [11, 12, 13, 14][: len(prompts)]
        errors = [behave(trial.setting.cache, STEPS, prompt)[1] for prompt in prompts]
        assert trial.psnrs == pytest.approx([decibels(error) for error in errors])
        seconds = behave(trial.setting.cache, STEPS, "a")[0]
        assert trial.seconds == pytest.approx([seconds] * len(prompts))
        assert trial.speedup == pytest.approx(BASELINE_S / seconds)
        assert trial.median_seconds == pytest.approx(seconds)
        assert trial.worst_psnr == min(trial.psnrs)
        assert trial.skipped == STEPS / 2 * len(prompts)
    assert result.baseline_seconds == pytest.approx(BASELINE_S)
    assert result.prompts == PROMPTS


def test_trials_come_by_rank_those_to_the_end_first(search: Search) -> None:
    result = search(Target(psnr=43.0))
    is_done = [len(trial.psnrs) == len(PROMPTS) for trial in result.trials]
    assert is_done == sorted(is_done, reverse=True)
    done = result.trials[: sum(is_done)]
    ranks = [trial.rank(result.target) for trial in done]
    assert ranks == sorted(ranks, reverse=True)
    assert result.winner == result.trials[0].setting


def test_fewer_steps_are_drawn_to_compare_with(search: Search) -> None:
    result = search(Target(psnr=43.0))
    counts = [trial.setting.num_inference_steps for trial in result.fewer_steps]
    assert counts == [14, 10, 7, 5, 3]
    for trial in result.fewer_steps:
        assert trial.setting.cache == NoCacheConfig()
        assert len(trial.psnrs) == len(PROMPTS)
        steps = trial.setting.num_inference_steps
        assert trial.speedup == pytest.approx(STEPS / steps)


def test_one_step_has_no_fewer_steps(search: Search) -> None:
    def one(cache: AbstractCacheConfig, steps: int, prompt: str) -> tuple[float, float]:
        return (1.0 if isinstance(cache, NoCacheConfig) else 0.5), 1.0

    painter = Painter(one, names=("teacache",))
    result = search(Target(speedup=1.5), painter, num_inference_steps=1)
    assert result.fewer_steps == ()
    assert result.winner.num_inference_steps == 1


def test_a_cache_that_saves_nothing_never_wins(search: Search) -> None:
    def slow(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        if isinstance(cache, AutoConfig):
            return STEPS / 10, 0.0  # all steps, so equal pictures
        return behave(cache, steps, prompt)

    painter = Painter(slow, names=("teacache", "auto"))
    for psnr in (52.0, 90.0):  # beyond what teacache has
        result = search(Target(psnr=psnr), painter)
        assert not result.is_met
        assert result.winner.cache == TeaCacheConfig(0.01)
    result = search(Target(psnr=46.0), painter)
    assert isinstance(result.winner.cache, TeaCacheConfig)


def test_the_best_of_several_methods_wins(search: Search) -> None:
    def mixed(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        if isinstance(cache, AutoConfig):
            is_best = cache.tolerance == 0.2
            return (0.5 if is_best else 1.0), (0.6 if is_best else 9.0)
        return behave(cache, steps, prompt)

    painter = Painter(mixed, names=("teacache", "auto"))
    result = search(Target(psnr=43.0), painter)
    assert result.winner.cache == AutoConfig(tolerance=0.2)
    assert set(result.refused) == set(CACHES) - {"none", "teacache", "auto"}
    assert result.refused["pab"] == "cache: no pab here"
    only = search(Target(psnr=43.0), painter, methods=["teacache", "teacache"])
    assert isinstance(only.winner.cache, TeaCacheConfig)
    assert only.refused == {}


def test_pictures_at_the_target_count_for_more_than_a_good_first_one(
    search: Search,
) -> None:
    def late(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seconds, error = behave(cache, steps, prompt)
        if isinstance(cache, TeaCacheConfig):
            # Below 0.1 all is well; at 0.1 all but the last; above it the first is
            # just below, which is more than the last of 0.1.
            first = 2.0 if cache.threshold <= 0.1 else 3.2
            last = 2.0 if cache.threshold < 0.1 else 4.0
            error = last if prompt == "d" else first
        return seconds, error

    result = search(Target(psnr=decibels(3.0)), Painter(late, names=("teacache",)))
    assert result.is_met
    assert result.winner.cache == TeaCacheConfig(0.07)


def test_the_fastest_of_those_with_equal_pictures_wins(search: Search) -> None:
    def equal(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seconds, error = behave(cache, steps, prompt)
        return seconds, 0.0 if isinstance(cache, TeaCacheConfig) else error

    for target in (Target(psnr=40.0), Target(speedup=1.1), Target(seconds=1.8)):
        result = search(target, Painter(equal, names=("teacache",)))
        assert result.winner.cache == TeaCacheConfig(0.8)
        assert trial_of(result).worst_psnr == math.inf


# What is given up.


@pytest.mark.parametrize(
    ("target", "reasons"),
    [
        (Target(psnr=38.0), {"a picture at .* dB", "slower than teacache.*"}),
        (
            Target(speedup=2.0),
            {"too slow", "a picture at .* dB, no better than the best"},
        ),
        (
            Target(seconds=1.0),
            {"too slow", "a picture at .* dB, no better than the best"},
        ),
    ],
)
def test_the_hopeless_are_given_up_early_and_why(
    search: Search, target: Target, reasons: set[str]
) -> None:
    result = search(target)
    left = [trial for trial in result.trials if len(trial.psnrs) < len(PROMPTS)]
    done = [trial for trial in result.trials if len(trial.psnrs) == len(PROMPTS)]
    assert all(trial.given_up == "" for trial in done)
    assert left
    for trial in left:
        assert any(re.fullmatch(words, trial.given_up) for words in reasons)
    for words in reasons:
        assert any(re.fullmatch(words, trial.given_up) for trial in left), words
    # None of them could have won.
    best = trial_of(result).rank(target)
    for trial in left:
        speed, likeness = figures(trial.setting.cache)
        assert replace_psnr(trial, likeness, speed).rank(target) <= best


def replace_psnr(trial: Trial, psnr: float, speedup: float) -> Trial:
    return Trial(trial.setting, [psnr], [BASELINE_S / speedup], [speedup], 1)


def test_what_may_still_win_is_drawn_to_the_end(search: Search) -> None:
    noisy: Counter[AbstractCacheConfig] = Counter()

    def noise(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seconds, error = behave(cache, steps, prompt)
        noisy[cache] += 1
        # Of the fastest that is like enough, the first is a fifth too slow.
        is_first = noisy[cache] == 1 and cache == best
        return seconds * (1.2 if is_first else 1.0), error

    best = search(Target(psnr=46.0)).winner.cache
    noisy.clear()
    result = search(Target(psnr=46.0), Painter(noise, names=("teacache",)))
    assert figures(result.winner.cache) == figures(best)


# What nothing reaches.


def test_a_psnr_that_nothing_reaches_gives_the_most_like(search: Search) -> None:
    result = search(Target(psnr=90.0), validation_prompts=("u", "v"))
    assert not result.is_met
    assert result.num_validated == 1
    drawn = [
        figures(trial.setting.cache)[1] for trial in result.trials if trial.is_faster
    ]
    assert figures(result.winner.cache)[1] == max(drawn)
    assert result.winner == result.trials[0].setting
    assert trial_of(result).given_up == ""
    assert len(trial_of(result).psnrs) == len(PROMPTS)


def test_a_speed_that_nothing_reaches_gives_the_fastest(search: Search) -> None:
    for target in (Target(speedup=100.0), Target(seconds=0.01)):
        result = search(target)
        assert not result.is_met
        speeds = [figures(trial.setting.cache)[0] for trial in result.trials]
        assert figures(result.winner.cache)[0] == pytest.approx(max(speeds))


# When the time is over.


def test_a_budget_ends_the_search(search: Search) -> None:
    found = {}
    for budget in (1e-9, 32.0, 42.0, 1e9):
        result = search(Target(psnr=44.0), budget_seconds=budget)
        found[budget] = len(result.trials)
        assert result.is_finished == (budget == 1e9)
        for trial in result.trials:
            is_done = len(trial.psnrs) == len(PROMPTS)
            assert bool(trial.given_up) != is_done
        assert len(trial_of(result).psnrs) == len(PROMPTS)
        over = [t for t in result.trials if t.given_up == "the time was over"]
        assert bool(over) == (budget == 42.0)
    # One setting in any case; those to start from; some of their neighbours.
    assert list(found.values())[:2] == [1, 3]
    assert 3 < found[42.0] < found[1e9]


def test_a_search_that_was_done_in_time_is_finished(search: Search) -> None:
    painter = Painter(behave, names=("teacache",))
    ended: list[float] = []

    def on_progress(share: float, label: str) -> None:
        if label.startswith("validating") and not ended:
            ended.append(painter.now)

    search(Target(psnr=46.0), painter, on_progress=on_progress)
    again = Painter(behave, names=("teacache",))
    result = search(Target(psnr=46.0), again, budget_seconds=ended[0] + 0.1)
    # Validation took longer than was left.
    assert result.seconds == pytest.approx(again.now)
    assert result.seconds > ended[0] + 0.1
    assert result.is_finished


# Validation.


def test_what_fails_on_other_prompts_makes_way_for_the_next(search: Search) -> None:
    target = Target(psnr=43.0)
    plain = search(target)
    ranked = [trial for trial in plain.trials if not trial.given_up]
    first, second, third = (trial.setting.cache for trial in ranked[:3])
    assert all(trial.meets(target) for trial in ranked[:3])

    def failing(*caches: AbstractCacheConfig) -> Painter:
        def worse(
            cache: AbstractCacheConfig, steps: int, prompt: str
        ) -> tuple[float, float]:
            seconds, error = behave(cache, steps, prompt)
            is_failing = cache in caches and prompt == "v"
            return seconds, 50.0 if is_failing else error

        return Painter(worse, names=("teacache",))

    result = search(target, failing(first))
    assert (result.is_met, result.num_validated) == (True, 2)
    assert result.winner.cache == second
    assert result.validation.of_kind("cache")[0].setting.cache == second
    result = search(target, failing(first, second))
    assert (result.is_met, result.num_validated) == (True, 3)
    assert result.winner.cache == third
    result = search(target, failing(*(trial.setting.cache for trial in ranked)))
    assert not result.is_met
    assert result.num_validated == min(5, len(ranked))
    assert result.winner.cache == first
    assert result.validation.of_kind("cache")[0].setting.cache == first


def test_what_fails_is_not_replaced_when_the_time_is_over(search: Search) -> None:
    def worse(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seconds, error = behave(cache, steps, prompt)
        is_failing = prompt in UNSEEN and not isinstance(cache, NoCacheConfig)
        return seconds, 50.0 if is_failing else error

    painter = Painter(worse, names=("teacache",))
    result = search(Target(psnr=44.0), painter, budget_seconds=56.0)
    assert not result.is_finished
    done = [trial for trial in result.trials if not trial.given_up]
    assert sum(trial.meets(result.target) for trial in done) > 1
    assert (result.is_met, result.num_validated) == (False, 1)
    left = sum(trial.meets(result.target) for trial in done) - 1
    assert result.num_left == left
    assert result.miss_words == (
        f"no setting that was validated reaches {result.target}; {left} more do on the "
        "prompts tuned on, a larger budget may validate them"
    )


@pytest.mark.parametrize(
    "target", [Target(psnr=100.0), Target(speedup=1.5), Target(seconds=1.5)]
)
def test_a_cache_that_skips_nothing_meets_no_target(
    search: Search, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_chance(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        return (BASELINE_S if isinstance(cache, NoCacheConfig) else 1.0), 0.0

    # Its warm-up is as long as the run.
    monkeypatch.setattr("painters.is_computed", lambda cache, step: True)
    result = search(target, Painter(by_chance, names=("teacache",)))
    assert not result.is_met
    assert {trial.skipped for trial in result.trials} == {0}
    assert all(trial.speedup > 1 for trial in result.trials)
    assert result.num_left == 0
    assert result.miss_words == f"no setting reaches {target}"


def test_fewer_steps_are_left_out_when_the_time_is_over(search: Search) -> None:
    painter = Painter(behave, names=("teacache",))
    result = search(Target(psnr=43.0), painter, budget_seconds=1.0)
    assert result.fewer_steps == ()
    assert result.validation.of_kind("cache")


def test_a_cache_that_is_slower_on_other_prompts_does_not_meet_the_target(
    search: Search,
) -> None:
    def slower(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seconds, error = behave(cache, steps, prompt)
        is_slow = prompt in UNSEEN and not isinstance(cache, NoCacheConfig)
        return (3.0 if is_slow else seconds), error

    for target in (Target(psnr=43.0), Target(speedup=1.5), Target(seconds=1.3)):
        result = search(target, Painter(slower, names=("teacache",)))
        assert not result.is_met


def test_validation_is_of_other_prompts_and_other_noise(search: Search) -> None:
    painter = Painter(behave, names=("teacache",))
    result = search(Target(psnr=43.0), painter, seed=5)
    assert result.validation.prompts == UNSEEN
    assert [row.kind for row in result.validation.rows[:2]] == ["baseline", "cache"]
    assert result.validation.rows[1].setting == result.winner
    assert result.validation.rows[2].label == result.validation.rows[1].control
    seeds = {request.prompts[0]: request.seed for request in painter.drawn}
    assert seeds == {"a": 5, "b": 6, "c": 7, "d": 8, "u": 9, "v": 10}


def test_default_prompts_are_never_validated_on(search: Search) -> None:
    result = search(Target(psnr=43.0), prompts=None, validation_prompts=None)
    assert (result.prompts, result.validation.prompts) == (
        PLAIN_PROMPTS[:4],
        PLAIN_PROMPTS[4:],
    )
    # What a caller tunes on is left out of the other half.
    mine = (PLAIN_PROMPTS[5], "a", PLAIN_PROMPTS[0])
    result = search(Target(psnr=43.0), prompts=mine, validation_prompts=None)
    assert result.prompts == mine
    assert result.validation.prompts == (PLAIN_PROMPTS[4], *PLAIN_PROMPTS[6:])


def test_prompts_to_tune_and_to_validate_on_may_not_overlap(search: Search) -> None:
    painter = Painter(behave, names=("teacache",))
    for prompts, unseen in ((PROMPTS, ("u", "c")), (None, PLAIN_PROMPTS[:1])):
        with pytest.raises(RequestError, match="is to be tuned and validated on; give"):
            search(
                Target(psnr=43.0), painter, prompts=prompts, validation_prompts=unseen
            )
    assert painter.drawn == []


# The rest.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_seconds": 0}, "tune: budget_seconds must be a number above 0, got 0"),
        ({"budget_seconds": math.nan}, "budget_seconds must be a number above 0"),
        ({"budget_seconds": "9"}, "budget_seconds must be a number above 0, got '9'"),
        ({"prompts": []}, "prompts: expected at least one"),
        ({"validation_prompts": []}, "prompts: expected at least one"),
        ({"prompts": ["a", "a"]}, "prompts: 'a' is there twice"),
        ({"methods": "auto"}, "tune: expected names of caches, got 'auto'"),
        ({"methods": []}, "tune: expected names of caches, got []"),
        ({"methods": ["none"]}, "tune: expected taylorseer, first-block"),
        ({"methods": ["teacache", "tea"]}, "got 'tea'"),
        ({"methods": ["teacache", "pab"]}, "cache: no pab here"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"height": 17}, "height must be a multiple of 16, got 17"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_drawing(
    search: Search, options: dict[str, Any], message: str
) -> None:
    painter = Painter(behave, names=("teacache",))
    with pytest.raises(RequestError, match=re.escape(message)):
        search(Target(psnr=40.0), painter, **options)
    assert painter.drawn == []


def test_a_pipeline_without_caches_has_nothing_to_tune(search: Search) -> None:
    with pytest.raises(RequestError, match="was compiled without any cache; give cac"):
        search(Target(psnr=40.0), Painter(behave, names=()))


def test_settings_reach_the_pipeline(search: Search) -> None:
    painter = Painter(behave, names=("teacache",))
    result = search(
        Target(psnr=40.0),
        painter,
        num_inference_steps=10,
        height=32,
        width=48,
        guidance_scale=2.0,
    )
    for request in painter.drawn:
        assert (request.height, request.width) == (32, 48)
        assert request.guidance_scale == 2.0
    assert result.winner.num_inference_steps == 10
    assert result.validation.num_inference_steps == 10


def test_progress_is_of_the_budget_and_can_end_the_search(search: Search) -> None:
    told: list[tuple[float, str]] = []
    result = search(
        Target(psnr=46.0),
        budget_seconds=60.0,
        on_progress=lambda share, label: told.append((share, label)),
    )
    searching = [s for s, label in told if not label.startswith("validating ")]
    assert searching == sorted(searching)
    assert 0 < searching[0] < 0.01
    assert 0.5 < searching[-1] <= 1.0
    validating = [s for s, label in told if label.startswith("validating ")]
    assert validating == sorted(validating)
    assert validating[-1] == 1.0
    assert f"validating {result.winner.label}" in {label for _, label in told}

    def stop(share: float, label: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(Target(psnr=46.0), on_progress=stop)


def test_a_result_is_plain_json(search: Search) -> None:
    result = search(Target(psnr=43.0))
    plain = result.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["target"] == {"psnr": 43.0, "speedup": None, "seconds": None}
    assert plain["winner"] == result.winner.to_dict()
    assert plain["validation"] == result.validation.to_dict()
    assert len(plain["trials"]) == len(result.trials)
    assert plain["trials"][0]["worst_psnr"] == result.trials[0].worst_psnr
    assert plain["fewer_steps"][0]["label"] == "14 steps"
    assert (plain["is_met"], plain["is_finished"]) == (True, True)
    assert plain["prompts"] == list(PROMPTS)


def test_what_was_reached_is_told_in_words(search: Search) -> None:
    result = search(Target(psnr=43.0))
    row = result.validation.of_kind("cache")[0]
    words = result.nearest_words
    assert words.startswith(f"{row.metric('psnr')[1]:.1f} dB at worst, ")
    assert f"{row.speedup:.2f} times as fast, {row.median_seconds:.3g} s" in words
    tuned = trial_of(result)
    assert result.tuned_words == (
        f"{tuned.worst_psnr:.1f} dB at worst, {tuned.speedup:.2f} times as fast"
    )

    def equal(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        return behave(cache, steps, prompt)[0], 0.0

    result = search(Target(psnr=43.0), Painter(equal, names=("teacache",)))
    assert result.nearest_words.startswith("equal pictures, ")
