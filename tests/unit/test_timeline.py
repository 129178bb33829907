"""The timeline: every step's action where it belongs, in its colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image
from reports import make_report, make_step
from scipy import ndimage

from max_diffusion.core.report import RunReport
from max_diffusion.media.timeline import draw_timeline

COMPUTE, PREDICT, REUSE = (0x24, 0x56, 0xC8), (0xF2, 0xB1, 0x34), (0x5F, 0xBF, 0x8F)
MIXED = (0x9A, 0xA5, 0xBD)


def run(
    steps: int,
    action: Callable[[int, int], str],
    *,
    samples: int = 1,
    branches: tuple[str, ...] = ("conditional",),
    milliseconds: Callable[[int], float] = lambda step: 10.0,
) -> RunReport:
    return make_report(
        tuple(
            make_step(
                step,
                branch=branch,
                actions=tuple(action(step, sample) for sample in range(samples)),
                milliseconds=milliseconds(step),
            )
            for step in range(steps)
            for branch in branches
        )
    )


def pixels(image: Image.Image, colour: tuple[int, int, int]) -> int:
    counts = {shown: count for count, shown in image.getcolors(1 << 24) or []}
    return counts.get(colour, 0)


def bands(image: Image.Image, y: int, colours: set[tuple[int, int, int]]) -> list[int]:
    """Which colours follow one another along a line, each cell once."""
    found, was_inside = [], False
    for x in range(image.width):
        shown = image.getpixel((x, y))
        if shown in colours and not was_inside:
            found.append(sorted(colours).index(shown))
        was_inside = shown in colours
    return found


def test_timeline_shows_each_steps_action_in_order() -> None:
    actions = ("compute", "predict", "predict", "reuse", "compute")
    image = draw_timeline(run(5, lambda step, sample: actions[step]))
    colours = {COMPUTE, PREDICT, REUSE}
    order = sorted(colours)
    wanted = [order.index(c) for c in (COMPUTE, PREDICT, PREDICT, REUSE, COMPUTE)]
    assert bands(image, 118, colours) == wanted


def test_timeline_has_a_row_a_sample_and_branch() -> None:
    heights = {
        (samples, len(branches)): draw_timeline(
            run(3, lambda step, sample: "compute", samples=samples, branches=branches)
        ).height
        for samples in (1, 4)
        for branches in (("conditional",), ("conditional", "unconditional"))
    }
    row = heights[1, 2] - heights[1, 1]
    assert row > 20
    assert heights[4, 1] == heights[1, 1] + 3 * row
    assert heights[4, 2] == heights[1, 1] + 7 * row


def test_timeline_shows_only_what_was_done() -> None:
    plain = draw_timeline(run(6, lambda step, sample: "compute"))
    assert pixels(plain, COMPUTE) > 1000
    assert pixels(plain, PREDICT) == pixels(plain, REUSE) == pixels(plain, MIXED) == 0


def test_timeline_marks_steps_in_which_samples_differ() -> None:
    def action(step: int, sample: int) -> str:
        return "compute" if sample == 0 or step == 0 else "reuse"

    image = draw_timeline(run(3, action, samples=2))
    assert pixels(image, MIXED) > 2 * 1000  # two bars of full height
    assert pixels(image, COMPUTE) > 1000
    assert pixels(image, REUSE) > 500


def test_timeline_bars_are_as_high_as_their_milliseconds() -> None:
    def bar(milliseconds: float) -> int:
        image = draw_timeline(
            run(
                2,
                lambda step, sample: ("compute", "predict")[step],
                milliseconds=lambda step: (100.0, milliseconds)[step],
            )
        )
        return pixels(image, PREDICT)

    assert bar(75.0) - bar(50.0) == pytest.approx(bar(50.0) - bar(25.0), rel=0.1)
    assert bar(75.0) > 1.5 * bar(25.0)


def test_timeline_counts_the_time_of_branches_that_ran_as_one_once() -> None:
    def bar(milliseconds: float, *, is_time_shared: bool) -> int:
        steps = [
            make_step(0, milliseconds=100.0),
            *(
                make_step(
                    1,
                    branch=branch,
                    actions=("predict",),
                    milliseconds=milliseconds,
                    is_time_shared=is_time_shared,
                )
                for branch in ("conditional", "unconditional")
            ),
        ]
        return pixels(draw_timeline(make_report(tuple(steps))), PREDICT)

    assert bar(50.0, is_time_shared=True) == bar(25.0, is_time_shared=False)


def test_timeline_without_times_has_no_bars_and_is_as_large() -> None:
    def image(milliseconds: float | None) -> Image.Image:
        steps = (make_step(step, milliseconds=milliseconds) for step in range(12))
        return draw_timeline(make_report(tuple(steps)))

    timed, untimed = image(10.0), image(None)
    assert timed.size == untimed.size
    assert pixels(untimed, COMPUTE) == pytest.approx(12 * 28 * 23, rel=0.1)  # cells
    assert pixels(timed, COMPUTE) > 3 * pixels(untimed, COMPUTE)


@pytest.mark.parametrize("steps", [1, 28, 250, 1000])
def test_timeline_is_of_a_size_to_look_at(steps: int) -> None:
    image = draw_timeline(run(steps, lambda step, sample: "compute"))
    assert image.mode == "RGB"
    assert 640 <= image.width <= max(1300, 5 * steps)


def test_the_meaning_of_every_colour_is_readable() -> None:
    """Of few steps, what the colours mean is the widest."""
    kinds = ("compute", "estimate", "partial", "reuse")
    image = draw_timeline(run(4, lambda step, sample: kinds[step]))
    margin = np.asarray(image)[-60:, -24:]
    assert (margin == 255).all()
    assert (np.asarray(image)[-60:, -120:-24] != 255).any()


def test_timeline_of_a_run_that_did_nothing_or_something_new_is_drawn() -> None:
    assert pixels(draw_timeline(make_report()), COMPUTE) == 0
    image = draw_timeline(run(4, lambda step, sample: "skip"))
    assert pixels(image, MIXED) > 1000


# What decisions were based on.


def run_with_signals(
    signals: list[tuple[float, ...] | None],
    *,
    actions: Sequence[tuple[str, ...]] | None = None,
    cache: dict[str, object] | None = None,
) -> RunReport:
    return make_report(
        tuple(
            make_step(
                step,
                signal=signal,
                actions=actions[step] if actions else ("compute",) * len(signal or "x"),
            )
            for step, signal in enumerate(signals)
        ),
        cache=cache or {"name": "auto"},
    )


def dots(report: RunReport) -> list[tuple[int, int]]:
    """Centres of the signals' dots, from left to right: they are 7 pixels high."""
    plain = make_report(
        tuple(make_step(s.step, actions=s.actions) for s in report.steps),
        cache=report.cache,
    )
    image = np.asarray(draw_timeline(report))
    top = draw_timeline(plain).height - 84 - 110
    panel = image[top : image.shape[0] - 84 - 110 - 18]
    labels, count = ndimage.label((panel == COMPUTE).all(axis=2))
    centres = ndimage.center_of_mass(labels > 0, labels, range(1, count + 1))
    return sorted((round(x), round(y)) for y, x in centres)


def test_signals_are_drawn_only_where_there_are_any() -> None:
    nothing = draw_timeline(run_with_signals([None, None]))
    unknown = draw_timeline(run_with_signals([None, (math.nan,)]))
    some = draw_timeline(run_with_signals([None, (0.5,)]))
    assert unknown.tobytes() == nothing.tobytes()
    assert some.height > nothing.height + 100


def test_signals_are_as_high_as_their_values() -> None:
    values = [0.0, 0.25, 0.5, 1.0]
    found = dots(run_with_signals([(value,) for value in values]))
    (x0, low), *others = found
    assert len(found) == len(values)
    highest = others[-1][1]
    for step, (value, (x, y)) in enumerate(zip(values, found, strict=True)):
        assert x == x0 + 30 * step
        assert y == pytest.approx(low - value * (low - highest), abs=1)
    assert low - highest > 90


def test_signals_leave_out_what_is_not_known() -> None:
    signals: list[tuple[float, ...] | None] = [None, (1.0,), (math.inf,), (0.5,)]
    assert len(dots(run_with_signals(signals))) == 2


def test_signals_have_the_colour_of_what_was_done() -> None:
    done: list[tuple[str, ...]] = [("compute",), ("reuse",), ("predict",), ("new",)]
    with_dots = run_with_signals([(1.0,)] * 4, actions=done)
    without = run_with_signals([None] * 4, actions=done)
    for colour in (COMPUTE, REUSE, PREDICT, MIXED):
        more = pixels(draw_timeline(with_dots), colour)
        assert more > pixels(draw_timeline(without), colour) + 20
    # Of two samples, each by its own.
    done = [("compute", "reuse")] * 3
    with_dots = run_with_signals([(1.0, 0.5)] * 3, actions=done)
    without = run_with_signals([None] * 3, actions=done)
    for colour in (COMPUTE, REUSE):
        more = pixels(draw_timeline(with_dots), colour)
        assert more > pixels(draw_timeline(without), colour) + 20


def test_every_sample_has_signals_of_its_own() -> None:
    one = dots(run_with_signals([(1.0,), (0.2,)]))
    two = dots(run_with_signals([(1.0, 0.6), (0.2, 0.8)]))
    assert (len(one), len(two)) == (2, 4)
    assert sorted(y - two[0][1] for _, y in two) == pytest.approx(
        [0, 20, 41, 82], abs=2
    )


@pytest.mark.parametrize(
    ("name", "key"), [("first-block", "threshold"), ("auto", "tolerance")]
)
@pytest.mark.parametrize("limit", [0.5, 1, np.float64(0.25)])
def test_the_limit_of_signals_is_a_line(name: str, key: str, limit: float) -> None:
    def lines(cache: dict[str, object]) -> list[int]:
        image = np.asarray(draw_timeline(run_with_signals([(2.0,)] * 9, cache=cache)))
        is_ink = (image == (0x1D, 0x24, 0x33)).all(axis=2)
        return [int(y) for y in np.flatnonzero(is_ink.sum(axis=1) > 9 * 30 * 0.9)]

    assert lines({"name": name}) == []
    assert lines({"name": "x", key: limit}) == []  # of no cache that is known
    assert len(lines({"name": name, key: limit})) == 1
    # Higher than all signals, it is the top of the scale, which has a line anyway.
    assert lines({"name": name, key: 3.0}) == []


def test_a_limit_is_on_the_scale_of_the_signals() -> None:
    below = dots(run_with_signals([(0.0,), (1.0,)], cache={"name": "x"}))
    cache = {"name": "first-block", "threshold": 2.0}
    above = dots(run_with_signals([(0.0,), (1.0,)], cache=cache))
    heights = [found[0][1] - found[1][1] for found in (below, above)]
    assert heights[1] == pytest.approx(heights[0] / 2, abs=1)
