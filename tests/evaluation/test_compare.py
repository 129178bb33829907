"""Comparisons: of the demo model, and of a pipeline whose times are known."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pictures
import pytest
from painters import STEPS, Painter, halving, picture_of

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    AutoConfig,
    NoCacheConfig,
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
    TextToImagePipeline,
)
from max_diffusion.demo import check, judge, parse_caption
from max_diffusion.evaluation import Comparison, Row, compare
from max_diffusion.execution.targets import HOSTS

PROMPTS = ("a red circle", "two green stars & <script>alert(1)</script>")
DEMO_STEPS = 10


@pytest.fixture(scope="module")
def comparison(demo: TextToImagePipeline) -> Comparison:
    """Of all that the demo model was compiled with."""
    return compare(
        demo,
        PROMPTS,
        num_inference_steps=DEMO_STEPS,
        fewer_steps=(3,),
        seed=7,
        runs=1,
        judge=judge,
    )


def labels(comparison: Comparison, kind: str) -> list[str]:
    return [row.label for row in comparison.of_kind(kind)]


# The demo model.


def test_rows_are_the_baseline_the_caches_and_fewer_steps(
    comparison: Comparison,
) -> None:
    assert labels(comparison, "baseline") == ["no cache"]
    assert labels(comparison, "cache") == ["taylorseer", "auto", "step-mask"]
    kinds = [row.kind for row in comparison.rows]
    fewer = comparison.of_kind("fewer steps")
    assert kinds == ["baseline", *["cache"] * 3, *["fewer steps"] * len(fewer)]
    counts = [row.setting.num_inference_steps for row in fewer]
    assert 3 in counts
    assert counts == sorted(set(counts), reverse=True)
    assert max(counts) < DEMO_STEPS
    assert labels(comparison, "fewer steps") == [f"{count} steps" for count in counts]
    assert comparison.baseline is comparison.rows[0]
    assert set(comparison.refused) == set(CACHES) - {
        *("none", "taylorseer", "auto", "step-mask")
    }


def test_a_control_is_an_uncached_run_of_no_more_steps(comparison: Comparison) -> None:
    controls = set()
    for row in comparison.of_kind("cache"):
        control = comparison.control_of(row)
        steps = control.setting.num_inference_steps
        assert 1 <= steps <= DEMO_STEPS
        assert control.setting.cache == NoCacheConfig()
        assert control.full_passes == steps == control.reports[0].total_passes
        assert control.kind == ("baseline" if steps == DEMO_STEPS else "fewer steps")
        controls.add(control.label)
    wanted = {*controls, "3 steps"} - {"no cache"}
    assert set(labels(comparison, "fewer steps")) == wanted
    assert all(row.control is None for row in comparison.rows if row.kind != "cache")


@pytest.mark.parametrize("label", ["no cache", "taylorseer", "step-mask", "3 steps"])
def test_rows_are_what_the_pipeline_draws(
    demo: TextToImagePipeline, comparison: Comparison, label: str
) -> None:
    [row] = [row for row in comparison.rows if row.label == label]
    for index, prompt in enumerate(PROMPTS):
        cached = demo.generate(
            prompt,
            num_inference_steps=row.setting.num_inference_steps,
            seed=7 + index,
            cache=row.setting.cache,
        )
        assert np.array_equal(row.images[index], cached.images[0])
        score = row.scores[index]
        assert (score.prompt, score.seed) == (prompt, 7 + index)
        # Which are what the pipeline draws without a cache: the first case.
        plain = comparison.baseline.images[index]
        wanted = pictures.psnr(cached.images[0], plain)
        assert score.psnr == pytest.approx(wanted)
        report = row.reports[index]
        assert report.prompts == (prompt,)
        assert report.full_passes == cached.report.full_passes
        assert [s.actions for s in report.steps] == [
            s.actions for s in cached.report.steps
        ]
        assert report.cache_bytes == cached.report.cache_bytes
    is_same = label == "no cache"
    assert (row.metric("psnr") == (math.inf, math.inf)) == is_same
    assert (row.metric("ssim") == (1.0, 1.0)) == is_same


def test_passes_are_counted(comparison: Comparison) -> None:
    by_label = {row.label: row for row in comparison.rows}
    assert by_label["no cache"].full_passes == DEMO_STEPS
    # Nine to warm up, and the tenth is forecast.
    assert by_label["taylorseer"].full_passes == 9
    mask = StepMaskConfig().required_steps(DEMO_STEPS)
    assert by_label["step-mask"].full_passes == len(mask) == 8
    assert by_label["3 steps"].full_passes == 3
    assert by_label["no cache"].cache_bytes == 0 < by_label["step-mask"].cache_bytes


def test_pictures_are_judged_where_prompts_are_scenes(
    comparison: Comparison,
) -> None:
    scene = parse_caption(PROMPTS[0])
    assert scene
    assert comparison.num_judged == 1
    for row in comparison.rows:
        assert row.num_judged == 1
        verdict = check(row.images[0], scene)
        told, untold = row.scores
        assert (told.is_right, told.why_not) == (verdict.is_right, verdict.reason)
        assert (untold.is_right, untold.why_not) == (None, "")
        assert row.right == int(verdict.is_right)
    assert comparison.baseline.right == 1


def test_a_comparison_tells_what_it_was_of(comparison: Comparison) -> None:
    assert (comparison.model, comparison.device) == ("demo", "cpu")
    assert (comparison.height, comparison.width) == (128, 128)
    assert (comparison.num_inference_steps, comparison.runs) == (DEMO_STEPS, 1)
    assert comparison.prompts == PROMPTS
    assert comparison.baseline.images.shape == (2, 128, 128, 3)
    assert set(comparison.versions) == {"max-diffusion", "max"}
    machine = comparison.machine
    assert set(machine) == {
        *("processor", "target", "cores", "memory_gib", "system", "python")
    }
    assert machine["target"] in HOSTS
    assert isinstance(machine["cores"], int)
    assert machine["cores"] >= 1


def test_a_comparison_is_plain_json(comparison: Comparison) -> None:
    plain = comparison.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["prompts"] == list(PROMPTS)
    assert plain["refused"] == dict(comparison.refused)
    for found, row in zip(plain["rows"], comparison.rows, strict=True):
        assert found["label"] == row.label
        assert found["kind"] == row.kind
        assert found["control"] == row.control
        assert CACHES[found["cache"]](**_tuples(found["options"])) == row.setting.cache
        assert found["full_passes"] == row.full_passes
        assert found["total_passes"] == row.setting.num_inference_steps
        steps = found["first_prompt_steps"]
        assert [s["actions"] for s in steps] == [
            list(s.actions) for s in row.reports[0].steps
        ]
        assert found["scores"][0]["prompt"] == PROMPTS[0]
        worst = row.metric("psnr")[1]
        assert found["psnr_worst"] == (None if math.isinf(worst) else worst)
        assert found["equal_pictures"] == sum(math.isinf(s.psnr) for s in row.scores)
        assert "lpips_median" not in found
    assert plain["rows"][0]["equal_pictures"] == 2


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def test_scenes_of_another_size_are_not_judged(demo: TextToImagePipeline) -> None:
    small = compare(
        demo,
        "a red circle",
        [],
        num_inference_steps=1,
        runs=1,
        height=64,
        width=64,
        judge=judge,
    )
    assert small.num_judged == 0
    assert small.baseline.scores[0].is_right is None
    assert small.baseline.right is None
    assert (small.height, small.width) == (64, 64)


# A pipeline whose times are known.


def paint(painter: Painter, *args: Any, **options: Any) -> Comparison:
    pipeline: Any = painter
    return compare(pipeline, *args, **options)


def test_a_control_takes_as_long_as_its_cache() -> None:
    def behave(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        if isinstance(cache, TaylorSeerConfig):
            return {2: 0.27, 3: 1.0, 4: 1.3, 5: 1.96, 6: 7.0, 8: 0.01}[
                cache.cache_interval
            ], 1.0
        return halving(cache, steps, prompt)

    caches = [TaylorSeerConfig(interval) for interval in (2, 3, 4, 5, 6, 8)]
    found = paint(Painter(behave), "a", caches, fewer_steps=(5, 10, 5), runs=1)
    assert [row.control for row in found.of_kind("cache")] == [
        *("3 steps", "10 steps", "13 steps", "no cache", "no cache", "1 step")
    ]
    fewer = [row.setting.num_inference_steps for row in found.of_kind("fewer steps")]
    assert fewer == [13, 10, 5, 3, 1]


def test_the_first_picture_is_in_no_other_figure() -> None:
    seen: Counter[object] = Counter()

    def behave(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seen[cache, steps] += 1
        seconds, error = halving(cache, steps, prompt)
        return (100.0 if seen[cache, steps] == 1 else seconds), error

    found = paint(Painter(behave), ["a", "b"], runs=2)
    assert found.of_kind("fewer steps")
    for row in found.rows:
        assert row.first_seconds == 100.0
        steps = row.setting.num_inference_steps
        seconds = steps / 20 if row.kind == "cache" else steps / 10
        assert row.seconds == ((seconds,) * 2,) * 2
        assert row.denoise_seconds == row.seconds
        assert row.median_seconds == seconds
        assert row.speedup == pytest.approx(2.0 / seconds)
        assert row.control in (None, "10 steps")


def test_speed_is_by_medians() -> None:
    painter = Painter()

    def behave(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seconds, error = halving(cache, steps, prompt)
        if isinstance(cache, AutoConfig) and prompt == "c":
            seconds /= 5  # an outlier, which a ratio of sums would show
        # As does what happens now and then to the machine.
        return seconds * (7 if len(painter.drawn) % 11 == 0 else 1), error

    painter.behave = behave
    found = paint(painter, ["a", "b", "c"], runs=3)
    assert max(value for row in found.rows for value in sum(row.seconds, ())) > 6
    for row in found.rows:
        assert row.speedup == found.baseline.median_seconds / row.median_seconds
    for row in found.of_kind("cache"):
        assert row.speedup == pytest.approx(2.0)
    assert found.baseline.speedup == 1.0


def test_all_settings_are_drawn_in_turn_in_another_order_each_round() -> None:
    painter = Painter()
    found = paint(painter, ["a", "b", "c"], fewer_steps=(7,), runs=2, seed=5)
    count = len(found.rows)
    assert [row.label for row in found.rows] == [
        *("no cache", "taylorseer", "auto", "10 steps", "7 steps")
    ]
    drawn = [
        (request.cache, request.num_inference_steps) for request in painter.drawn[-30:]
    ]
    everything = {(r.setting.cache, r.setting.num_inference_steps) for r in found.rows}
    rounds = [drawn[start : start + count] for start in range(0, 30, count)]
    assert all(set(settings) == everything for settings in rounds)
    assert len({tuple(settings) for settings in rounds}) > 3
    assert len({settings[0] for settings in rounds}) > 1
    before = {
        settings[index - 1]
        for settings in rounds
        for index in range(1, count)
        if settings[index][1] == 7
    }
    assert len(before) > 1
    seeds = [request.seed for request in painter.drawn[-30::count]]
    assert seeds == [5, 6, 7, 5, 6, 7]


def test_a_control_is_chosen_by_several_prompts() -> None:
    def behave(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        if isinstance(cache, NoCacheConfig):
            return steps / 10, 0.0
        return {"a": 0.5, "b": 1.5, "c": 1.6}[prompt], 1.0

    found = paint(Painter(behave), ["a", "b", "c"], ["auto"], runs=1)
    assert found.rows[1].control == "12 steps"
    # Of one prompt the shortest of several pictures.
    taken = iter([9.0, 1.5, 1.2, 7.0, *[1.0] * 9])

    def vary(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        if isinstance(cache, NoCacheConfig):
            return steps / 10, 0.0
        return next(taken), 1.0

    found = paint(Painter(vary), "a", ["auto"], runs=1)
    assert found.rows[1].control == "12 steps"


@pytest.mark.parametrize("runs", [1, 3])
def test_every_setting_is_timed_as_often_as_asked(runs: int) -> None:
    painter = Painter()
    found = paint(painter, ["a", "b"], runs=runs, num_images=1)
    assert found.runs == runs
    for row in found.rows:
        assert [len(seconds) for seconds in row.seconds] == [runs, runs]
        assert (len(row.scores), len(row.reports)) == (2, 2)
        assert row.images.shape == (1, 16, 16, 3)
    times = Counter(
        (request.cache, request.num_inference_steps) for request in painter.drawn
    )
    # A first, and three by which the control is chosen; of fewer steps the first.
    assert sorted(times.values()) == sorted([4 + 2 * runs] * 3 + [1 + 2 * runs])


def test_a_network_for_other_pictures_is_told_before_any_is_drawn() -> None:
    def lpips(picture: np.ndarray, reference: np.ndarray) -> float:
        assert picture.shape == reference.shape
        raise RequestError(f"a network of 8 x 8, got {picture.shape}")

    given: Any = lpips
    for size, shape in (({}, "16, 16, 3"), ({"height": 32}, "32, 16, 3")):
        painter = Painter()
        with pytest.raises(RequestError, match=f"got .{shape}"):
            paint(painter, ["a"], ["auto"], lpips=given, **size)
        assert painter.drawn == []


def test_a_control_that_is_not_near_says_so() -> None:
    taken = iter([1.0] * 4 + [1.05, 1.5, 0.8] * 9)

    def vary(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        if isinstance(cache, NoCacheConfig):
            return steps / 10, 0.0
        return next(taken), 1.0

    found = paint(Painter(vary), "a", ["auto"], runs=1)
    assert found.control_words(found.rows[1]) == "10 steps"  # 1.00 to 1.05
    taken = iter([1.0] * 4 + [1.25] * 9)
    found = paint(Painter(vary), "a", ["auto"], runs=1)
    assert found.control_words(found.rows[1]) == "10 steps (80 %)"
    assert found.control_words(found.baseline) == ""
    with pytest.raises(RequestError, match="fewer_steps must be a sequence of numbers"):
        paint(Painter(), "a", ["auto"], fewer_steps=3)


def test_rows_sum_up_their_pictures() -> None:
    def behave(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seconds, _ = halving(cache, steps, prompt)
        error = {"a": 0.5, "b": 2.0, "c": 8.0, "d": 0.0}[prompt]
        return seconds, 0.0 if isinstance(cache, NoCacheConfig) else error

    def lpips(picture: np.ndarray, reference: np.ndarray) -> float:
        return float(np.mean(picture != reference))

    given: Any = lpips
    found = paint(
        Painter(behave), ["a", "b", "c", "d"], ["auto"], lpips=given, runs=1, seed=1
    )
    [row] = found.of_kind("cache")
    decibels = [
        pictures.psnr(picture, picture_of(1 + i))
        for i, picture in enumerate(row.images)
    ]
    assert [score.psnr for score in row.scores] == pytest.approx(decibels)
    # The worse of the two in the middle.
    assert row.metric("psnr") == pytest.approx((decibels[1], decibels[2]))
    shares = [error / 64 for error in (0.5, 2.0, 8.0, 0.0)]
    assert [score.lpips for score in row.scores] == pytest.approx(shares, abs=1e-3)
    assert row.metric("lpips") == pytest.approx((2 / 64, 8 / 64), abs=1e-3)
    ssims = [score.ssim for score in row.scores]
    assert row.metric("ssim") == (ssims[1], min(ssims))
    assert ssims[2] < ssims[1] < ssims[0] < ssims[3] == 1.0
    assert row.cache_bytes == 4 * 1024  # the largest of all prompts
    assert row.full_passes == STEPS / 2
    assert row.right is None
    plain = row.to_dict()
    assert plain["lpips_worst"] == row.metric("lpips")[1]
    assert plain["equal_pictures"] == 1
    assert plain["scores"][3]["psnr"] is None


def test_full_passes_are_the_mean_of_all_prompts() -> None:
    row = paint(Painter(), ["a", "b"], ["auto"], runs=1).rows[1]
    first, second = row.reports
    mixed: Row = replace(
        row, reports=(first, replace(second, steps=second.steps[: STEPS // 2]))
    )
    assert mixed.full_passes == (STEPS / 2 + STEPS / 4) / 2


def test_without_caches_there_is_the_baseline_alone() -> None:
    found = paint(Painter(), "a", [], runs=1)
    assert [row.label for row in found.rows] == ["no cache"]
    assert found.refused == {}
    assert set(paint(Painter(), "a", runs=1).refused) == set(CACHES) - {
        *("none", "taylorseer", "auto")
    }


def test_steps_are_the_pipelines_unless_given() -> None:
    assert paint(Painter(), "a", [], runs=1).num_inference_steps == STEPS
    found = paint(Painter(), "a", [], runs=1, num_inference_steps=4, height=32, seed=9)
    assert found.num_inference_steps == 4


def test_sizes_and_guidance_reach_the_pipeline() -> None:
    painter = Painter()
    paint(painter, "a", runs=1, height=32, width=48, guidance_scale=1.5, seed=9)
    for request in painter.drawn:
        assert (request.height, request.width) == (32, 48)
        assert (request.guidance_scale, request.seed) == (1.5, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one"),
        ({"caches": ["pab"]}, "cache: no pab here"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"runs": 0}, "compare: runs must be at least 1, got 0"),
        ({"runs": 1001}, "compare: runs must be at most 1000, got 1001"),
        ({"num_images": 0}, "compare: num_images must be at least 1, got 0"),
        ({"fewer_steps": [0]}, "compare: fewer_steps must be at least 1, got 0"),
        ({"fewer_steps": [STEPS]}, "compare: fewer_steps must be at most 19, got 20"),
        ({"fewer_steps": [2.5]}, "compare: fewer_steps must be a whole number"),
        ({"height": 17}, "height must be a multiple of 16, got 17"),
    ],
)
def test_what_cannot_be_compared_is_told_before_drawing(
    options: dict[str, Any], message: str
) -> None:
    painter = Painter()
    with pytest.raises(RequestError, match=message):
        paint(painter, **{"prompts": "a"} | options)
    assert painter.drawn == []


def test_progress_grows_to_the_end_and_can_end_it() -> None:
    told: list[tuple[float, str]] = []
    found = paint(
        Painter(),
        ["a", "b"],
        fewer_steps=(3,),
        runs=2,
        on_progress=lambda share, label: told.append((share, label)),
    )
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.01
    assert shares[-1] == 1.0
    assert {label for _, label in told} == {row.label for row in found.rows}

    def stop(share: float, label: str) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paint(Painter(), "a", on_progress=stop)
