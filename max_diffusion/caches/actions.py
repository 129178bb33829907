"""The words for what a denoising step did with a sample."""

from __future__ import annotations

from enum import StrEnum, unique
from typing import final


@final
@unique
class Action(StrEnum):
    """Names what a step did with a sample, for reports, timelines and the web page.

    Members are strings, so that a report is JSON as it is.

    Attributes:
        words: The action in a few words, for a legend.
        letter: The action in one letter, where colour may not be seen.
        colour: Colour of the action as ``#rrggbb``, which people with any colour vision
            tell from the others'.
    """

    words: str
    letter: str
    colour: str

    COMPUTE = "compute", "computed in full", "C", "#2456c8"
    """The whole transformer ran."""
    PREDICT = "predict", "forecast from earlier steps", "F", "#f2b134"
    """The prediction was forecast, and nothing of the transformer ran."""
    REUSE = "reuse", "front computed, tail reused", "R", "#5fbf8f"
    """The first blocks ran, and what the others add was known."""
    PARTIAL = "partial", "known attention or modules", "P", "#b07aa1"
    """All blocks ran, and the output of some of their modules was known."""
    ESTIMATE = "estimate", "estimated from the other branch", "E", "#8c6d46"
    """The unconditional prediction was estimated from the conditional one."""

    def __new__(cls, value: str, words: str, letter: str, colour: str) -> Action:
        """Creates a member whose string value is its word."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.words, member.letter, member.colour = words, letter, colour
        return member
