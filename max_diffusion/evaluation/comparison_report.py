"""Writes what :func:`compare` found, as a page, images and JSON."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..core.files import prepared_folder, write_text
from ..media.images import save_atomically
from ..media.timeline import draw_timeline
from .charts import Point, quality_chart
from .comparison import Comparison, Row, Score
from .pages import render

AMPLIFICATION: Final = 8
"""Factor that differences of images are multiplied by, to be seen."""
_MIN_SIDE, _MAX_SIDE = 160, 384
_MAX_NAME: Final = 100  # of the 255 characters that a file's name may have
_INK, _MUTED = "#1d2433", "#5b6475"


def save_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Writes ``report.html``, which holds all, ``report.json`` and the images.

    Args:
        comparison: Result of :func:`compare`.
        folder: Folder to write to, made if it is missing; files of these names in it
            are replaced.

    Returns:
        The paths of all files written, the page's first.

    Raises:
        RequestError: A file cannot be written.
    """
    path = prepared_folder(folder)
    pictures = {
        "contact-sheet.png": contact_sheet(comparison),
        "quality.png": comparison_chart(comparison),
    }
    timelines = timeline_names(comparison)
    for row in comparison.of_kind("cache"):
        pictures[timelines[row.label]] = draw_timeline(row.reports[0])
    for name, picture in pictures.items():
        save_atomically(path / name, picture)
    page = render(
        "comparison.html",
        comparison=comparison,
        table=summary_table(comparison),
        decibels=decibels,
        digits=digits,
        verdict=_verdict,
        amplification=AMPLIFICATION,
        chart=data_url(pictures["quality.png"]),
        timelines={
            label: data_url(pictures[name]) for label, name in timelines.items()
        },
        pictures={
            row.label: [data_url(_shown(p)) for p in row.images]
            for row in comparison.rows
        },
        differences={
            row.label: [
                data_url(_shown(difference(p, q)))
                for p, q in zip(row.images, comparison.baseline.images, strict=True)
            ]
            for row in comparison.rows
        },
    )
    write_text(path / "report.html", page)
    write_text(path / "report.json", json.dumps(comparison.to_dict(), indent=1) + "\n")
    names = ("report.html", "report.json", *pictures)
    return [path / name for name in names]


def timeline_names(comparison: Comparison) -> dict[str, str]:
    """Returns different file names for the caches' timelines, by label."""
    names: dict[str, str] = {}
    for row in comparison.of_kind("cache"):
        words = re.sub(r"[^a-z0-9.]+", "-", row.label.lower())[:_MAX_NAME]
        if f"timeline-{words}.png" in names.values():
            words += f"-{len(names) + 1}"
        names[row.label] = f"timeline-{words}.png"
    return names


def comparison_chart(comparison: Comparison) -> Image.Image:
    """Draws the chart of the rows' median PSNR over their median time."""

    def point(row: Row) -> Point:
        method = row.setting.cache.name
        return Point(method, row.label, row.median_seconds, row.metric("psnr")[0])

    count = len(comparison.prompts)
    return quality_chart(
        f"{comparison.model}, {comparison.num_inference_steps} steps: "
        "likeness to no cache, and the time it takes",
        [point(row) for row in comparison.of_kind("cache")],
        [point(row) for row in comparison.of_kind("fewer steps")],
        comparison.baseline.median_seconds,
        psnr_name="PSNR" if count == 1 else f"median PSNR of {count} pictures",
    )


def difference(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Computes how far each value of an image is off, amplified.

    Args:
        image: The image, uint8 ``(H, W, 3)``.
        reference: The image to compare with, of the same dtype and shape.

    Returns:
        uint8 ``(H, W, 3)``: absolute differences times :data:`AMPLIFICATION`, at most
        255.
    """
    error = np.abs(image.astype(np.int16) - reference.astype(np.int16))
    return np.minimum(AMPLIFICATION * error, 255).astype(np.uint8)


def contact_sheet(comparison: Comparison) -> Image.Image:
    """Draws a sheet of all images: a column per cache, the baseline first.

    Each prompt has four rows: the caches' images, their amplified differences, the
    fewer steps that take as long, and their differences.
    """
    caches = comparison.of_kind("cache")
    height, width = comparison.baseline.images.shape[1:3]
    scale = min(max(_MIN_SIDE, width), _MAX_SIDE) / width
    cell_width, cell_height = round(width * scale), round(height * scale)
    left, top, gap, head = 130, 108, 8, 30
    count = len(comparison.baseline.images)
    block = head + 4 * (cell_height + gap)
    size = (
        left + (1 + len(caches)) * (cell_width + gap) + 16,
        top + count * block + 12,
    )
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    title = f"{comparison.model}, {comparison.num_inference_steps} steps"
    pen.text((16, 14), title, _INK, ImageFont.load_default(22))

    def paste(picture: np.ndarray, column: int, y: int) -> None:
        image = Image.fromarray(picture)
        if image.size != (cell_width, cell_height):
            image = image.resize((cell_width, cell_height), Image.Resampling.LANCZOS)
        sheet.paste(image, (left + column * (cell_width + gap), y))

    def words(column: int, y: int, text: str, colour: str = _INK) -> None:
        font = ImageFont.load_default(12)
        place = (left + column * (cell_width + gap), y)
        pen.text(place, _fitted(text, font, cell_width), colour, font)

    for column, row in enumerate((comparison.baseline, *caches)):
        method, _, options = row.label.partition(":")
        words(column, 44, method)
        words(column, 58, options.replace(":", " "), _MUTED)
        words(column, 72, f"{digits(1e3 * row.median_seconds)} ms", _MUTED)
        if row.control:
            words(column, 86, f"{row.speedup:.2f} times; {row.control}", _MUTED)
    for index in range(count):
        y = top + index * block
        font = ImageFont.load_default(14)
        prompt = " ".join(comparison.prompts[index].split())
        pen.text((16, y + 6), _fitted(prompt, font, size[0] - 32), _INK, font)
        reference = comparison.baseline.images[index]
        rows = ("cached", f"difference x{AMPLIFICATION}", "fewer steps", "difference")
        for line, name in enumerate(rows):
            place = (16, y + head + line * (cell_height + gap) + cell_height // 2)
            pen.text(place, name, _MUTED, ImageFont.load_default(12), "lm")
        paste(reference, 0, y + head)
        for column, row in enumerate(caches, start=1):
            for line, shown in ((0, row), (2, comparison.control_of(row))):
                picture = shown.images[index]
                at = y + head + line * (cell_height + gap)
                paste(picture, column, at)
                paste(difference(picture, reference), column, at + cell_height + gap)
    return sheet


def _shown(picture: np.ndarray) -> Image.Image:
    """Returns an image as the page shows it: no larger than can be seen there."""
    image = Image.fromarray(picture)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def _fitted(text: str, font: Any, width: int) -> str:
    """Returns as much of a text as fits in ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def decibels(value: float) -> str:
    """Formats a PSNR in dB; an infinite one is ``equal``."""
    return "equal" if np.isinf(value) else f"{value:.1f} dB"


def digits(value: float) -> str:
    """Formats a number with four digits, and without a power of ten."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _verdict(score: Score) -> str:
    """Returns what an image's caption adds where a judge could tell."""
    if score.is_right is None:
        return ""
    return ", right" if score.is_right else f", wrong: {score.why_not}"


def data_url(image: Image.Image) -> str:
    """Encodes an image as a ``data:`` URL, for a page that needs no other file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def summary_table(comparison: Comparison) -> Mapping[str, list[str]]:
    """Returns the table that the page and the terminal show.

    Returns:
        The columns by name, in order, each with a cell for every row of the
        comparison.
    """
    table: dict[str, list[str]] = {}
    names = ["psnr", "ssim"]
    if comparison.baseline.scores[0].lpips is not None:
        names.append("lpips")
    for row in comparison.rows:
        cells = {
            "": row.label,
            "ms": digits(1e3 * row.median_seconds),
            "first": digits(1e3 * row.first_seconds),
            "speed-up": f"{row.speedup:.2f}",
            "same time": comparison.control_words(row),
            "full passes": (
                f"{digits(row.full_passes)} of {row.reports[0].total_passes}"
            ),
        }
        for name in names:
            for word, value in zip(("median", "worst"), row.metric(name), strict=True):
                form = ".1f" if name == "psnr" else ".4f"
                cell = "equal" if np.isinf(value) else f"{value:{form}}"
                cells[f"{name.upper()} {word}"] = (
                    "" if row is comparison.baseline else cell
                )
        if comparison.num_judged:
            cells["right"] = f"{row.right or 0} of {row.num_judged}"
        cells["cache state"] = f"{digits(row.cache_bytes / 1024)} KiB"
        for name, cell in cells.items():
            table.setdefault(name, []).append(cell)
    return table
