"""Charts of measured times and likeness."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from PIL import Image

from ..caches import CACHES
from ..caches.config import OTHER_STYLE

_INK, _MUTED, _GRID = "#1d2433", "#5b6475", "#e3e6ec"
_DPI = 150
_LONGEST_NAME = 44  # characters; longer ones leave no room for the chart


@dataclass(frozen=True)
class Point:
    """One setting in a chart."""

    method: str
    """Name of the cache, in whose style the point is drawn."""
    label: str
    """Words beside the mark."""
    seconds: float
    """Seconds that a whole image or video takes."""
    psnr: float
    """PSNR in dB; infinite where all images are equal to the uncached ones."""
    is_faint: bool = False
    """Whether the mark is pale: the setting was given up early."""


def quality_chart(
    title: str,
    points: Sequence[Point],
    fewer_steps: Sequence[Point],
    baseline_seconds: float,
    *,
    psnr_name: str,
    noun: str,
    target_psnr: float | None = None,
    target_seconds: float | None = None,
    chosen: Point | None = None,
    front: Sequence[Point] = (),
) -> Image.Image:
    """Draws likeness over time: caches as marks, fewer steps as the line to beat.

    Args:
        title: Words above the chart.
        points: Points of the caches.
        fewer_steps: Points of fewer steps without a cache.
        baseline_seconds: Seconds that an image takes without a cache in all steps.
        psnr_name: Words that tell which PSNR this is, for the axis.
        noun: What is drawn: ``picture`` or ``video``.
        target_psnr: PSNR in dB that is to be reached, drawn as a line.
        target_seconds: Seconds that are to be kept, drawn as a line.
        chosen: A point to name; without one all points are, as far as there is room.
        front: Points to join by a line.

    Returns:
        RGB image.
    """
    figure, axes = _chart(title)
    finite = [p.psnr for p in (*points, *fewer_steps) if math.isfinite(p.psnr)]
    top = 1.06 * max(finite, default=60.0)
    line = sorted(fewer_steps, key=lambda p: p.seconds)
    axes.plot(
        [1e3 * p.seconds for p in line],
        [min(p.psnr, top) for p in line],
        color=_INK,
        marker=".",
        linewidth=1.5,
        label="no cache, fewer steps",
    )
    axes.axvline(1e3 * baseline_seconds, color=_MUTED, linestyle=":", linewidth=1.2)
    baseline = axes.annotate(
        "no cache, all steps",
        (1e3 * baseline_seconds, 0.98),
        (-4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        fontsize=8,
        color=_MUTED,
    )
    names = [baseline]
    named: set[str] = set()
    for p in sorted(points, key=lambda p: not p.is_faint):
        kind = CACHES.get(p.method)
        style = OTHER_STYLE if kind is None else kind.style
        axes.plot(
            1e3 * p.seconds,
            min(p.psnr, top),
            style.marker,
            color=style.colour,
            alpha=0.35 if p.is_faint else 1.0,
            markersize=6 if p.is_faint else 8,
            markeredgecolor="white",
            markeredgewidth=0.7,
            linestyle="none",
            label=None if p.method in named else p.method,
        )
        named.add(p.method)
        if chosen is None:
            words = p.label.removeprefix(p.method).lstrip(":")
            names.append(_name(axes, p, top, words))
    names += [_name(axes, p, top, p.label, below=True) for p in line]
    if front:
        axes.plot(
            [1e3 * p.seconds for p in front],
            [min(p.psnr, top) for p in front],
            color="#d1495b",
            linewidth=1,
            zorder=1,
            label="best of all",
        )
    if chosen is not None:
        place = (1e3 * chosen.seconds, min(chosen.psnr, top))
        axes.plot(*place, "o", markersize=17, fillstyle="none", color=_INK)
        _name(axes, chosen, top, chosen.label, bold=True)
    if target_psnr is not None:
        axes.axhline(target_psnr, color="#c0392b", linewidth=1, linestyle="--")
    if target_seconds is not None:
        axes.axvline(1e3 * target_seconds, color="#c0392b", linewidth=1, linestyle="--")
    if any(math.isinf(p.psnr) for p in (*points, *fewer_steps)):
        axes.axhline(top, color=_GRID, linewidth=1)
        axes.annotate(
            f"equal {noun}s",
            (0.01, top),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color=_MUTED,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel(f"milliseconds a {noun}, text encoders and decoder included")
    axes.set_ylabel(f"{psnr_name}, dB")
    legend = axes.legend(loc="lower right", fontsize=8, frameon=True, framealpha=0.9)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)  # a method's first mark may be faint
    _keep_apart(figure, names)
    return _image(figure)


def bar_chart(
    title: str, values: Mapping[str, float], unit: str, ours: Sequence[str]
) -> Image.Image:
    """Draws horizontal bars, the shortest on top.

    Args:
        title: Words above the chart.
        values: Length of each bar by name.
        unit: Unit of the values, ``ms`` say.
        ours: Names whose bars have another colour.

    Returns:
        RGB image.
    """
    figure, axes = _chart(title, height=1.4 + 0.34 * len(values))
    ranked = sorted(values.items(), key=lambda item: -item[1])
    names, lengths = [n for n, _ in ranked], [v for _, v in ranked]
    colours = ["#2456c8" if name in ours else "#9aa5bd" for name in names]
    bars = axes.barh(names, lengths, color=colours)
    axes.bar_label(
        bars, [f"{written(v)} {unit}" for v in lengths], padding=4, fontsize=8
    )
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.16)
    axes.set_xlabel(unit)
    return _image(figure)


def written(value: float) -> str:
    """Formats a number with three digits, and without a power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _chart(title: str, height: float = 5.4) -> tuple[Figure, Axes]:
    # Not by pyplot, which keeps every figure in a global list.
    figure = Figure(figsize=(9, height), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=_INK, fontsize=12)
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_MUTED, labelsize=9)
    return figure, axes


def _name(
    axes: Axes,
    p: Point,
    top: float,
    words: str,
    *,
    below: bool = False,
    bold: bool = False,
) -> Annotation:
    is_long = len(words) > _LONGEST_NAME
    return axes.annotate(
        f"{words[: _LONGEST_NAME - 1]}…" if is_long else words,
        (1e3 * p.seconds, min(p.psnr, top)),
        (5, -5) if below else (11, 11) if bold else (7, 4),
        textcoords="offset points",
        fontsize=9 if bold else 7,
        fontweight="bold" if bold else "normal",
        va="top" if below else "baseline",
        color=_INK if bold else _MUTED,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
        if bold
        else None,
    )


def _keep_apart(figure: Figure, names: Sequence[Annotation]) -> None:
    """Leaves out names that would be over another before them, or over the edge."""
    # Where they are is known when all the rest has its place.
    for name in names:
        name.set_in_layout(False)
    figure.draw_without_rendering()
    kept: list[Bbox] = []
    for name in names:
        place = name.get_window_extent()
        is_inside = place.x1 <= figure.bbox.x1
        if is_inside and not any(place.overlaps(other) for other in kept):
            kept.append(place)
        else:
            name.set_visible(False)


def _image(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)  # what it is drawn by, instead of pyplot's
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
