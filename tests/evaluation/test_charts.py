"""Charts: what is written in them can be read."""

from __future__ import annotations

from matplotlib.figure import Figure

from max_diffusion.evaluation.charts import _keep_apart, written


def test_names_over_others_or_over_the_edge_are_left_out() -> None:
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1])
    places = {"first": 0.1, "over the first": 0.11, "apart": 0.5, "over the edge": 1.0}
    names = [axes.annotate(words, (at, at)) for words, at in places.items()]
    _keep_apart(figure, names)
    assert [n.get_text() for n in names if n.get_visible()] == ["first", "apart"]


def test_figures_have_no_powers_of_ten() -> None:
    values = (15432.1, 1143.0, 99.94, 5.756, 0.01234)
    assert [*map(written, values)] == ["15432", "1143", "99.9", "5.76", "0.0123"]
