"""What a program found in the images or videos of a demo model, and what they show."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from max_diffusion.demo import Verdict


def counts(groups: Mapping[str, Sequence[Verdict]]) -> dict[str, dict[str, float]]:
    """Counts what is right in each group, the groups in order."""
    return {
        name: {
            "prompts": len(members),
            "right": sum(v.is_right for v in members),
            "objects_right": sum(v.objects_right for v in members),
            "percent": 100 * sum(v.is_right for v in members) / len(members),
        }
        for name, members in sorted(groups.items())
    }


def table(summary: Mapping[str, Mapping[str, float]]) -> Table:
    """The counts of :func:`counts`, a line each."""
    found = Table("group", "prompts", "right", "objects right", "%")
    for name, row in summary.items():
        found.add_row(
            name,
            str(row["prompts"]),
            str(row["right"]),
            str(row["objects_right"]),
            f"{row['percent']:.1f}",
        )
    return found


def captioned(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Pictures of 128 x 128, six a row with their prompts below."""
    columns, width, height = 6, 152, 206
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for index, (picture, text) in enumerate(zip(pictures, captions, strict=False)):
        x, y = index % columns * width, index // columns * height
        grid.paste(Image.fromarray(picture), (x + 12, y + 6))
        lines = textwrap.wrap(text, 25)
        place = (x + width // 2, y + 138)
        pen.multiline_text(
            place, "\n".join(lines), "#333", font, anchor="ma", align="center"
        )
    return grid
