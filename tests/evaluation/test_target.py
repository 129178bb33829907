"""What a tuned cache must reach, and how settings are ranked by it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from painters import Painter

from max_diffusion import RequestError
from max_diffusion.evaluation import Setting, Target, tune
from max_diffusion.evaluation.target import Trial


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected one of psnr, speedup and seconds, got none"),
        ({"psnr": 40, "seconds": 1}, "one of psnr, speedup and seconds, got psnr, sec"),
        ({"psnr": 0}, "target: psnr must be a number above 0, got 0"),
        ({"psnr": -1.5}, "target: psnr must be a number above 0, got -1.5"),
        ({"psnr": math.inf}, "target: psnr must be a number above 0, got inf"),
        ({"psnr": math.nan}, "target: psnr must be a number above 0, got nan"),
        ({"psnr": True}, "target: psnr must be a number above 0, got True"),
        ({"seconds": "1"}, "target: seconds must be a number above 0, got '1'"),
        ({"speedup": 1}, "target: speedup must be a number above 1, got 1"),
    ],
)
def test_a_target_is_one_number_in_range(values: Any, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        Target(**values)


def test_targets_are_told_in_words() -> None:
    assert str(Target(psnr=40.0)) == "every picture at 40 dB or more"
    assert str(Target(speedup=2.5)) == "2.5 times as fast"
    assert str(Target(seconds=0.25)) == "a picture in 0.25 s"
    videos = [Target(psnr=40.0), Target(speedup=2.5), Target(seconds=0.25)]
    assert [target.words(is_video=True) for target in videos] == [
        *("every frame at 40 dB or more", "2.5 times as fast", "a video in 0.25 s")
    ]


def trial(psnrs: list[float], speedups: list[float], seconds: float = 1.0) -> Trial:
    times = [seconds] * len(psnrs)
    return Trial(Setting.without_cache(1), psnrs, times, speedups, skipped=1)


@pytest.mark.parametrize(
    ("target", "psnrs", "speedups", "seconds", "is_met"),
    [
        (Target(psnr=40), [40, 50], [2, 2], 1, True),
        (Target(psnr=40), [39.9, 50], [2, 2], 1, False),
        (Target(psnr=40), [math.inf] * 3, [0.9, 1.0, 3], 1, False),
        (Target(psnr=40), [math.inf] * 3, [0.9, 1.1, 3], 1, True),
        (Target(speedup=2), [1] * 3, [1, 2, 9], 1, True),
        (Target(speedup=2), [math.inf] * 3, [1, 1.9, 9], 1, False),
        (Target(seconds=1), [1], [1.1], 1, True),
        (Target(seconds=1), [1], [0.5], 1, False),  # no cache is better
        (Target(seconds=0.99), [math.inf], [9], 1, False),
    ],
)
def test_a_target_is_met_by_the_worst_picture_or_the_median_time(
    target: Target,
    psnrs: list[float],
    speedups: list[float],
    seconds: float,
    is_met: bool,
) -> None:
    assert trial(psnrs, speedups, seconds).meets(target) == is_met


def test_ranks_are_by_what_the_target_leaves_open() -> None:
    quick, alike = trial([41, 45], [4, 4], 0.5), trial([50, 50], [2, 2], 1.0)
    equal = trial([math.inf], [1.0], 2.0)

    def best(target: Target) -> Trial:
        return max(quick, alike, equal, key=lambda one: one.rank(target))

    assert best(Target(psnr=40)) is quick  # both reach it
    assert best(Target(psnr=45)) is alike
    assert best(Target(psnr=60)) is alike  # none that is faster does
    assert best(Target(speedup=1.5)) is alike
    assert best(Target(speedup=3)) is quick
    assert best(Target(speedup=9)) is quick
    assert best(Target(seconds=1.5)) is alike
    assert best(Target(seconds=0.7)) is quick
    assert best(Target(seconds=0.1)) is quick


def test_a_trial_is_plain_json() -> None:
    given = trial([math.inf, 40.0], [2.0, 2.0])
    given.given_up = "why"
    found = given.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["psnrs"], found["worst_psnr"]) == ([None, 40.0], 40.0)
    assert (found["given_up"], found["skipped"]) == ("why", 1)


def test_a_target_that_is_none_is_refused_before_drawing() -> None:
    painter: Any = Painter()
    given: Any = 30
    with pytest.raises(RequestError, match=r"expected a Target, Target\(psnr=30\) say"):
        tune(painter, given)
    assert painter.drawn == []
