"""The figures of a step beyond its graphs; none of them is judged."""

from __future__ import annotations

from benchmarks.harness.overhead import CONCURRENT, measure
from max_diffusion import TextToImagePipeline


def test_every_kind_of_step_and_turn_is_measured(demo: TextToImagePipeline) -> None:
    graphs = demo.models
    figures = {figure.what: figure for figure in measure(demo, steps=14, repeats=1)}
    assert demo.models is graphs
    kinds = ("none, compute", "taylorseer, compute", "taylorseer, predict")
    assert list(figures) == [
        *(f"alone, {kind}" for kind in kinds),
        *(f"engine, {count} at once" for count in CONCURRENT),
    ]
    counted = figures["alone, none, compute"].count
    assert counted == 13  # without the first
    both = figures["alone, taylorseer, compute"], figures["alone, taylorseer, predict"]
    assert sum(figure.count for figure in both) == counted
    assert all(figure.graph_ms > 0 and figure.own_ms > 0 for figure in figures.values())
