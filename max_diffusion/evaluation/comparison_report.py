"""Writes what :func:`compare` found, as a page, images and JSON."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..core.files import prepared_folder, write_text
from ..media.images import save_atomically
from ..media.timeline import draw_timeline
from .charts import Point, quality_chart
from .comparison import Comparison, Row, Score, shown_frames
from .pages import render

AMPLIFICATION: Final = 8
"""Factor that differences of images are multiplied by, to be seen."""
_MIN_SIDE, _MAX_SIDE = 160, 384
_STRIP_GAP: Final = 2  # pixels between the frames of a video
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
        likeness=_likeness,
        metrics_words=metrics_words(comparison),
        shown_words=shown_words(comparison),
        psnr_name=_psnr_name(comparison),
        starts=given_pictures(comparison),
        amplification=AMPLIFICATION,
        chart=data_url(pictures["quality.png"]),
        timelines={
            label: data_url(pictures[name]) for label, name in timelines.items()
        },
        pictures={
            row.label: [data_url(_shown(p)) for p in row.frames]
            for row in comparison.rows
        },
        differences={
            row.label: [
                data_url(_shown(difference(p, q)))
                for p, q in zip(row.frames, comparison.baseline.frames, strict=True)
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

    title = (
        f"{comparison.model}, {comparison.num_inference_steps} steps: "
        "likeness to no cache, and the time it takes"
    )
    return quality_chart(
        "\n".join(filter(None, (title, comparison.given_words))),
        [point(row) for row in comparison.of_kind("cache")],
        [point(row) for row in comparison.of_kind("fewer steps")],
        comparison.baseline.median_seconds,
        psnr_name=_psnr_name(comparison),
        noun=comparison.noun,
    )


def _psnr_name(comparison: Comparison) -> str:
    """Returns words that tell which PSNR the chart shows."""
    count = len(comparison.prompts)
    if comparison.is_video:
        name = "worst frame's PSNR"
        return name if count == 1 else f"median of {count} videos' {name}"
    return "PSNR" if count == 1 else f"median PSNR of {count} pictures"


def difference(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Computes how far each value of an image, or of several, is off, amplified.

    Args:
        image: The image, uint8 ``(..., H, W, 3)``.
        reference: The image to compare with, of the same dtype and shape.

    Returns:
        uint8 ``(..., H, W, 3)``: absolute differences times :data:`AMPLIFICATION`, at
        most 255.
    """
    error = np.abs(image.astype(np.int16) - reference.astype(np.int16))
    return np.minimum(AMPLIFICATION * error, 255).astype(np.uint8)


def contact_sheet(comparison: Comparison) -> Image.Image:
    """Draws a sheet of all images: a column per cache, the baseline first.

    Each prompt has four rows: the caches' images, their amplified differences, the
    fewer steps that take as long, and their differences. Of a video each is a strip of
    frames.
    """
    caches = comparison.of_kind("cache")
    count, num_shown, height, width, _ = comparison.baseline.frames.shape
    scale = min(max(_MIN_SIDE, width), _max_side(num_shown)) / width
    frame_size = round(width * scale), round(height * scale)
    cell_width = num_shown * (frame_size[0] + _STRIP_GAP) - _STRIP_GAP
    cell_height = frame_size[1]
    left, gap, head = 130, 8, 30
    block = head + 4 * (cell_height + gap)
    sheet_width = left + (1 + len(caches)) * (cell_width + gap) + 16
    small = ImageFont.load_default(12)
    given = _wrapped(comparison.given_words, small, sheet_width - 32)
    names_top = 44 + 16 * len(given)
    top = names_top + 64
    size = (sheet_width, top + count * block + 12)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    title = f"{comparison.model}, {comparison.num_inference_steps} steps"
    if comparison.is_video:
        title += f"; {shown_words(comparison)}"
    pen.text((16, 14), title, _INK, ImageFont.load_default(22))
    for line, words_given in enumerate(given):
        pen.text((16, 42 + 16 * line), words_given, _MUTED, small)
    starts = _starts(comparison)
    for index, start in enumerate(starts):
        room = (left - 16) // len(starts)
        start.thumbnail((room - gap, 60), Image.Resampling.LANCZOS)
        sheet.paste(start, (16 + index * room, names_top))

    def sized(frame: np.ndarray) -> Image.Image:
        image = Image.fromarray(frame)
        if image.size == frame_size:
            return image
        return image.resize(frame_size, Image.Resampling.LANCZOS)

    def paste(frames: np.ndarray, column: int, y: int) -> None:
        strip = _side_by_side([sized(frame) for frame in frames])
        sheet.paste(strip, (left + column * (cell_width + gap), y))

    def words(column: int, y: int, text: str, colour: str = _INK) -> None:
        place = (left + column * (cell_width + gap), names_top + y)
        pen.text(place, _fitted(text, small, cell_width), colour, small)

    for column, row in enumerate((comparison.baseline, *caches)):
        method, _, options = row.label.partition(":")
        words(column, 0, method)
        words(column, 14, options.replace(":", " "), _MUTED)
        words(column, 28, f"{digits(1e3 * row.median_seconds)} ms", _MUTED)
        if row.control:
            words(column, 42, f"{row.speedup:.2f} times; {row.control}", _MUTED)
    for index in range(count):
        y = top + index * block
        font = ImageFont.load_default(14)
        prompt = " ".join(comparison.prompts[index].split())
        pen.text((16, y + 6), _fitted(prompt, font, size[0] - 32), _INK, font)
        reference = comparison.baseline.frames[index]
        amplified = f"difference x{AMPLIFICATION}"
        rows = "cached", amplified, "fewer steps", amplified
        for line, name in enumerate(rows):
            place = (16, y + head + line * (cell_height + gap) + cell_height // 2)
            pen.text(place, name, _MUTED, small, "lm")
        paste(reference, 0, y + head)
        for column, row in enumerate(caches, start=1):
            for line, shown in ((0, row), (2, comparison.control_of(row))):
                frames = shown.frames[index]
                at = y + head + line * (cell_height + gap)
                paste(frames, column, at)
                paste(difference(frames, reference), column, at + cell_height + gap)
    return sheet


def given_pictures(comparison: Comparison) -> dict[str, str]:
    """Returns the pictures that all was drawn from, as ``data:`` URLs, by a caption."""
    found = {}
    for index, start in enumerate(_starts(comparison), start=1):
        start.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        assert comparison.inputs is not None
        count = len(comparison.inputs.images)
        name = f"picture {index}" if count > 1 else "picture"
        found["mask" if index > count else name] = data_url(start)
    return found


def _starts(comparison: Comparison) -> list[Image.Image]:
    """Returns the pictures that all was drawn from, and then the mask."""
    if comparison.inputs is None:
        return []
    inputs = comparison.inputs
    given = (*inputs.images, *((inputs.mask,) if inputs.mask else ()))
    shapes = [each.pixels.shape for each in given]
    return [
        Image.fromarray(each.pixels.reshape(shape[:2] if shape[2] == 1 else shape))
        for each, shape in zip(given, shapes, strict=True)
    ]


def _shown(frames: np.ndarray) -> Image.Image:
    """Returns frames as the page shows them: no larger than can be seen there."""
    side = _max_side(len(frames))
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _side_by_side(images)


def _max_side(num_shown: int) -> int:
    """Returns the most pixels a side of each of some frames that are side by side."""
    return max(_MIN_SIDE, _MAX_SIDE // num_shown)


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Returns images of one size as a strip; one alone as it is."""
    width, height = images[0].size
    step = width + _STRIP_GAP
    strip = Image.new("RGB", (len(images) * step - _STRIP_GAP, height), "white")
    for index, image in enumerate(images):
        strip.paste(image, (index * step, 0))
    return strip


def _fitted(text: str, font: Any, width: int) -> str:
    """Returns as much of a text as fits in ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Returns a text as lines, none wider than ``width`` pixels if words allow it."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def decibels(value: float) -> str:
    """Formats a PSNR in dB; an infinite one is ``equal``."""
    return "equal" if np.isinf(value) else f"{value:.1f} dB"


def digits(value: float) -> str:
    """Formats a number with four digits, and without a power of ten."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _likeness(score: Score) -> str:
    """Returns what a caption tells: decibels, and what a judge says where it could."""
    found = decibels(score.psnr)
    if score.num_frames > 1:
        mean = decibels(score.metrics["mean_psnr"])
        found += f" at worst, mean {mean}, flicker {score.flicker:.3f}"
    if score.is_right is None:
        return found
    return found + (", right" if score.is_right else f", wrong: {score.why_not}")


def metrics_words(comparison: Comparison) -> str:
    """Returns what the table's metrics of videos are; empty where they are images'."""
    if not comparison.is_video:
        return ""
    return (
        "A video's PSNR and SSIM are those of its worst frame; median and worst are "
        "over the prompts. Mean is over all frames of a video, of the median prompt. "
        "Flicker is by how many of 255 levels its changes from frame to frame differ "
        "from the uncached video's."
    )


def shown_words(comparison: Comparison) -> str:
    """Returns which of a video's frames are shown, counted from 1."""
    shown = [str(index + 1) for index in shown_frames(comparison.num_frames)]
    return f"frames {', '.join(shown)} of {comparison.num_frames}"


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
        for name in comparison.baseline.scores[0].metrics:
            what = name.removeprefix("mean_")
            form = {"psnr": ".1f", "flicker": ".3f"}.get(what, ".4f")
            heading = what if what == "flicker" else what.upper()
            # Of a mean only the median prompt's: the worst of a video is its frame's.
            words = ("median", "worst") if what == name else ("mean",)
            for word, value in zip(words, row.metric(name), strict=False):
                cell = "equal" if np.isinf(value) else f"{value:{form}}"
                cells[f"{heading} {word}"] = "" if row is comparison.baseline else cell
        if comparison.num_judged:
            cells["right"] = f"{row.right or 0} of {row.num_judged}"
        cells["cache state"] = f"{digits(row.cache_bytes / 1024)} KiB"
        for name, cell in cells.items():
            table.setdefault(name, []).append(cell)
    return table
