"""A picture of what each denoising step did."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from PIL import Image, ImageDraw, ImageFont

from .report import RunReport, StepRecord

_COLOURS: Mapping[str, str] = MappingProxyType(
    {"compute": "#2456c8", "predict": "#f2b134", "reuse": "#5fbf8f"}
)
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "compute": "computed in full",
        "predict": "forecast from earlier steps",
        "reuse": "front computed, tail reused",
    }
)
_INK, _MUTED, _LINE, _BAR = "#1d2433", "#6b7384", "#e3e6ec", "#9aa5bd"
_MARGIN, _LABEL, _ROW, _BARS = 36, 150, 26, 110


def draw_timeline(report: RunReport) -> Image.Image:
    """One row a sample and guidance branch, one cell a step, milliseconds below."""
    rows = _rows(report)
    steps = report.num_inference_steps
    cell = max(14, min(30, 1100 // max(steps, 1)))
    width = max(640, 2 * _MARGIN + _LABEL + steps * cell)
    top = 104
    bottom = top + len(rows) * _ROW
    image = Image.new("RGB", (width, bottom + _BARS + 92), "white")
    pen = ImageDraw.Draw(image)
    _draw_title(pen, report)
    left = _MARGIN + _LABEL
    for index, (label, actions) in enumerate(rows):
        y = top + index * _ROW
        pen.text((_MARGIN, y + 4), label, _MUTED, ImageFont.load_default(13))
        for step, action in enumerate(actions):
            x = left + step * cell
            box = (x + 1, y + 2, x + cell - 2, y + _ROW - 4)
            pen.rounded_rectangle(box, 3, fill=_COLOURS[action])
    _draw_bars(pen, report, left, bottom + 14, cell)
    _draw_legend(pen, rows, _MARGIN, bottom + _BARS + 54)
    return image


def _rows(report: RunReport) -> list[tuple[str, list[str]]]:
    """Label and actions of each branch and sample."""
    branches = list(dict.fromkeys(record.branch for record in report.steps))
    rows = []
    for branch in branches:
        records = [record for record in report.steps if record.branch == branch]
        samples = len(records[0].actions)
        for sample in range(samples):
            label = f"picture {sample + 1}" if samples > 1 else "picture"
            if len(branches) > 1:
                label += f", {branch}"
            rows.append((label, [record.actions[sample] for record in records]))
    return rows


def _draw_title(pen: ImageDraw.ImageDraw, report: RunReport) -> None:
    full, total = report.full_passes, report.total_passes
    saved = 100 * (1 - full / total) if total else 0.0
    settings = ", ".join(
        f"{key} {value}" for key, value in report.cache.items() if key != "name"
    )
    pen.text(
        (_MARGIN, 24),
        f"Cache: {report.cache.get('name')}",
        _INK,
        ImageFont.load_default(22),
    )
    line = f"{full} of {total} full transformer passes, {saved:.0f} % saved"
    if settings:
        line += f"   ({settings})"
    pen.text((_MARGIN, 58), line, _MUTED, ImageFont.load_default(14))


def _draw_bars(
    pen: ImageDraw.ImageDraw, report: RunReport, left: int, top: int, cell: int
) -> None:
    """Milliseconds of each step, all branches together, coloured by what was done."""
    by_step: dict[int, list[StepRecord]] = {}
    for record in report.steps:
        by_step.setdefault(record.step, []).append(record)
    totals = {s: sum(r.milliseconds for r in rs) for s, rs in by_step.items()}
    longest = max(totals.values(), default=0.0) or 1.0
    base = top + _BARS
    font = ImageFont.load_default(12)
    pen.text((_MARGIN, top), "milliseconds", _MUTED, ImageFont.load_default(13))
    pen.text((_MARGIN, top + 18), f"longest {longest:.1f}", _MUTED, font)
    for step, records in by_step.items():
        x = left + step * cell
        height = max(1, round((_BARS - 6) * totals[step] / longest))
        kinds = {action for record in records for action in record.actions}
        colour = _COLOURS[next(iter(kinds))] if len(kinds) == 1 else _BAR
        pen.rectangle((x + 3, base - height, x + cell - 4, base), fill=colour)
        if step % 5 == 0:
            pen.text((x + cell / 2, base + 6), str(step), _MUTED, font, anchor="ma")
    end = left + len(by_step) * cell
    pen.line((left, base + 1, end, base + 1), fill=_LINE, width=2)
    pen.text((_MARGIN, base + 5), "step", _MUTED, ImageFont.load_default(13))


def _draw_legend(
    pen: ImageDraw.ImageDraw, rows: list[tuple[str, list[str]]], x: int, y: int
) -> None:
    font = ImageFont.load_default(13)
    used = {action for _, actions in rows for action in actions}
    for action, words in _WORDS.items():
        if action in used:
            pen.rounded_rectangle((x, y, x + 16, y + 16), 3, fill=_COLOURS[action])
            pen.text((x + 24, y), words, _INK, font)
            x += 44 + int(pen.textlength(words, font))
