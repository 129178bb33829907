"""The timeline: every step's action where it belongs, in its colour."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from PIL import Image
from test_report import make_report, make_step

from max_diffusion.report import RunReport
from max_diffusion.timeline import draw_timeline

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
            found.append(sorted(colours).index(shown))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("steps", [1, 28, 250, 1000])
def test_timeline_is_of_a_size_to_look_at(steps: int) -> None:
    image = draw_timeline(run(steps, lambda step, sample: "compute"))
    assert image.mode == "RGB"
    assert 640 <= image.width <= max(1300, 5 * steps)


def test_timeline_of_a_run_that_did_nothing_or_something_new_is_drawn() -> None:
    assert pixels(draw_timeline(make_report()), COMPUTE) == 0
    image = draw_timeline(run(4, lambda step, sample: "skip"))
    assert pixels(image, MIXED) > 1000
