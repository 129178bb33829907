"""Texts that a text encoder does not see all of: what every family says of them."""

from __future__ import annotations

from collections.abc import Sequence


def notes_of_cuts(what: str, most: str, removed: Sequence[str]) -> list[str]:
    """Returns a line for each text that was longer than what is read of it.

    Args:
        what: ``prompt`` or ``negative prompt``.
        most: What is read, such as ``512 tokens``.
        removed: The end of each text that is not seen, empty where there is none.
    """
    return [
        f"{what} {index + 1} is longer than {most} and was cut; not seen: "
        f"{_shortened(text)}"
        for index, text in enumerate(removed)
        if text
    ]


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
