"""An image of what each denoising step did."""

from __future__ import annotations

import math
import textwrap

from PIL import Image, ImageDraw, ImageFont

from ..caches import CACHES, Action
from ..core.report import RunReport

_INK, _MUTED, _LINE, _MIXED = "#1d2433", "#6b7384", "#d9dde5", "#9aa5bd"
_MARGIN, _TOP, _ROW, _BARS = 36, 108, 28, 110
_PLOT_WIDTH, _LINE_LENGTH = 1000, 120
_ACTIONS = {action.value: action for action in Action}
_Rows = list[tuple[str, dict[int, str]]]


def draw_timeline(report: RunReport) -> Image.Image:
    """Draws one row per sample and guidance branch, one cell per step.

    Below are, where decisions were based on one, the signal, and each step's
    milliseconds, all branches together; a step that was not timed has no bar.

    Returns:
        RGB image; its height grows with the rows, its width with the steps.
    """
    rows = _rows(report)
    steps = max((record.step + 1 for record in report.steps), default=1)
    cell = max(4, min(30, _PLOT_WIDTH // steps))
    left = _MARGIN + 20 + max((_text_width(label, 14) for label, _ in rows), default=0)
    title, details = _title(report)
    legend = _legend(rows)
    needed = (
        left + steps * cell,
        left + sum(_entry_width(words) for _, words in legend),
        *(_MARGIN + _text_width(x, 15) for x in details),
    )
    top = _TOP + 20 * (len(details) - 1)
    signals = _signals(report)
    signals_top = top + len(rows) * _ROW + 18
    bars_top = signals_top + (_BARS + 18 if signals else 0)
    size = (max(640, *needed) + _MARGIN, bars_top + _BARS + 84)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.text((_MARGIN, 24), title, _INK, ImageFont.load_default(24))
    for index, line in enumerate(details):
        place = (_MARGIN, 62 + 20 * index)
        pen.text(place, line, _MUTED, ImageFont.load_default(15))
    for index, (label, actions) in enumerate(rows):
        y = top + index * _ROW
        pen.text((left - 12, y + 12), label, _INK, ImageFont.load_default(14), "rm")
        for step, action in actions.items():
            x = left + step * cell
            box = (x + 1, y + 1, x + cell - 2, y + _ROW - 5)
            pen.rounded_rectangle(box, min(4, cell // 4), _colour(action))
    if signals:
        _draw_signals(pen, report, signals, left, signals_top, cell)
    _draw_bars(pen, report, left, bars_top, cell)
    x, y = left, bars_top + _BARS + 46
    for colour, words in legend:
        pen.rounded_rectangle((x, y, x + 16, y + 16), 4, colour)
        pen.text((x + 24, y + 8), words, _INK, ImageFont.load_default(14), "lm")
        x += _entry_width(words)
    return image


def _rows(report: RunReport) -> _Rows:
    """Returns the label and the action by step of each branch's samples."""
    rows: dict[tuple[str, int], dict[int, str]] = {}
    for record in report.steps:
        for sample, action in enumerate(record.actions):
            rows.setdefault((record.branch, sample), {})[record.step] = action
    has_branches = len({branch for branch, _ in rows}) > 1
    return [
        (
            f"picture {sample + 1}" + (f", {branch}" if has_branches else ""),
            rows[branch, sample],
        )
        # An image's branches side by side: they are compared with one another.
        for branch, sample in sorted(rows, key=lambda key: key[1])
    ]


def _title(report: RunReport) -> tuple[str, list[str]]:
    full, total = report.full_passes, report.total_passes
    saved = 100 * (1 - full / total) if total else 0.0
    name = str(report.cache.get("name"))
    defaults = vars(CACHES[name]()) if name in CACHES else {}
    # What is off by default and was left so would only widen the image.
    settings = ", ".join(
        f"{key} {value}"
        for key, value in report.cache.items()
        if key != "name" and (value or value != defaults.get(key))
    )
    details = [f"{full} of {total} full transformer passes, {saved:.0f} % saved"]
    # Lines break between settings, not within one.
    lines = textwrap.wrap(
        settings.replace(" ", "\xa0").replace(",\xa0", ", "), _LINE_LENGTH
    )
    return f"Cache: {name}", details + [line.replace("\xa0", " ") for line in lines]


def _signals(report: RunReport) -> dict[tuple[str, int], dict[int, tuple[float, str]]]:
    """Returns the signal and the action by step of each sample that has a signal."""
    found: dict[tuple[str, int], dict[int, tuple[float, str]]] = {}
    for record in report.steps:
        for sample, value in enumerate(record.signal or ()):
            if math.isfinite(value):
                row = found.setdefault((record.branch, sample), {})
                row[record.step] = (value, record.actions[sample])
    return found


def _draw_signals(
    pen: ImageDraw.ImageDraw,
    report: RunReport,
    signals: dict[tuple[str, int], dict[int, tuple[float, str]]],
    left: int,
    top: int,
    cell: int,
) -> None:
    """Draws what each decision was based on, one line per row, and the limit."""
    limit = _limit(report)
    values = [value for row in signals.values() for value, _ in row.values()]
    highest = max(*values, limit or 0.0, 1e-12)
    base, small = top + _BARS, ImageFont.load_default(12)
    end = left + cell * (max(record.step for record in report.steps) + 1)

    def height(value: float) -> int:
        return base - round((_BARS - 8) * min(1.0, max(0.0, value / highest)))

    pen.line((left, height(highest), end, height(highest)), _LINE)
    pen.text((left - 12, height(highest)), f"{highest:.3g}", _MUTED, small, "rm")
    if limit is not None and limit < 0.9 * highest:
        pen.line((left, height(limit), end, height(limit)), _INK)
        # Away from what else is written there.
        y = min(height(limit), base - 22)
        pen.text((left - 12, y), f"limit {limit:.3g}", _MUTED, small, "rm")
    for row in signals.values():
        points = [
            (left + step * cell + cell // 2, height(value))
            for step, (value, _) in row.items()
        ]
        pen.line(points, _MIXED, 1)
        for (x, y), (_, action) in zip(points, row.values(), strict=True):
            colour = _colour(action)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    pen.line((left, base + 1, end, base + 1), _MUTED)
    pen.text((left - 12, base - 4), "signal", _INK, ImageFont.load_default(14), "rm")


def _draw_bars(
    pen: ImageDraw.ImageDraw, report: RunReport, left: int, top: int, cell: int
) -> None:
    """Draws the milliseconds of each step, all branches together, by action."""
    totals = report.step_milliseconds
    kinds: dict[int, set[str]] = {}
    for record in report.steps:
        kinds.setdefault(record.step, set()).update(record.actions)
    longest = max(totals.values(), default=0.0) or 1.0
    base = top + _BARS
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    end = left + cell * (max(kinds, default=0) + 1)
    if kinds and not totals:
        pen.text((left, base - 8), "the steps were not timed", _MUTED, small, "ls")
    for share in (1.0, 0.5) if totals else ():
        y = base - round(share * (_BARS - 8))
        pen.line((left, y, end, y), _LINE)
        text = f"{share * longest:.3g} ms"
        pen.text((left - 12, y), text, _MUTED, small, "rm")
    # Labels are some 20 pixels wide: every step, every fifth, or fewer yet.
    every = next((n for n in (1, 5, 10, 50, 100) if n * cell >= 24), 500)
    for step, actions in kinds.items():
        x = left + step * cell
        if step in totals:
            height = max(1, round((_BARS - 8) * totals[step] / longest))
            colour = _colour(actions.copy().pop() if len(actions) == 1 else "")
            pen.rectangle((x + 1, base - height, x + cell - 2, base), colour)
        if step % every == 0:
            pen.text((x + cell // 2, base + 8), str(step), _MUTED, small, "ma")
    pen.line((left, base + 1, end, base + 1), _MUTED)
    pen.text((left - 12, base + 6), "step", _INK, font, "ra")


def _legend(rows: _Rows) -> list[tuple[str, str]]:
    """Returns the colours that are in the picture, each with what it means."""
    used = {action for _, actions in rows for action in actions.values()}
    entries = [
        (_colour(action), _ACTIONS[action].words if action in _ACTIONS else action)
        for action in sorted(used)
    ]
    if any(
        len({actions.get(step) for _, actions in rows}) > 1 for step in _steps(rows)
    ):
        entries.append((_MIXED, "rows differ"))
    return entries


def _entry_width(words: str) -> int:
    return 52 + _text_width(words, 14)


def _limit(report: RunReport) -> float | None:
    """Returns the limit that the cache compared its signals with, if it says so."""
    kind = CACHES.get(str(report.cache.get("name")))
    option = None if kind is None else kind.signal_limit
    value = None if option is None else report.cache.get(option)
    return float(value) if isinstance(value, int | float) else None


def _colour(action: str) -> str:
    """Returns the colour of an action; a neutral one where several are meant."""
    return _ACTIONS[action].colour if action in _ACTIONS else _MIXED


def _steps(rows: _Rows) -> set[int]:
    return {step for _, actions in rows for step in actions}


def _text_width(text: str, size: int) -> int:
    return int(ImageFont.load_default(size).getlength(text)) + 1
