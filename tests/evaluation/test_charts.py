"""Charts: what is written in them can be read."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from max_diffusion.evaluation.charts import Point, _keep_apart, quality_chart, written


def test_names_over_others_or_over_the_edge_are_left_out() -> None:
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1])
    places = {"first": 0.1, "over the first": 0.11, "apart": 0.5, "over the edge": 1.0}
    names = [axes.annotate(words, (at, at)) for words, at in places.items()]
    _keep_apart(figure, names)
    assert [n.get_text() for n in names if n.get_visible()] == ["first", "apart"]


def test_a_faint_mark_is_not_faint_in_the_legend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Figure] = []
    module = "max_diffusion.evaluation.charts._image"
    monkeypatch.setattr(module, lambda figure: drawn.append(figure))
    points = [Point("auto", "auto", 1.0, 40.0, is_faint=True)]
    quality_chart("title", points, [], 2.0, psnr_name="PSNR", noun="picture")
    [axes] = drawn[0].axes
    legend = axes.get_legend()
    assert legend is not None
    handles = {h.get_label(): h for h in legend.legend_handles if h is not None}
    assert handles["auto"].get_alpha() == 1.0
    marks = [line for line in axes.get_lines() if line.get_label() == "auto"]
    assert [mark.get_alpha() for mark in marks] == [0.35]


def test_figures_have_no_powers_of_ten() -> None:
    values = (15432.1, 1143.0, 99.94, 5.756, 0.01234)
    assert [*map(written, values)] == ["15432", "1143", "99.9", "5.76", "0.0123"]
