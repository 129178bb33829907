"""Texts and their token ids: what every family says of them."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ModelLoadError
from .tokenizers import AbstractTokenizer


def check_ids(role: str, tokenizer: AbstractTokenizer, rows: int) -> None:
    """Checks that a text encoder's table has a row for every id of a tokenizer.

    Args:
        role: The tokenizer, for messages.
        tokenizer: The tokenizer.
        rows: Rows of the table.

    Raises:
        ModelLoadError: It has fewer.
    """
    # Ids beyond the table would be read from other memory.
    if tokenizer.vocab_size > rows:
        raise ModelLoadError(
            f"{role}: its {tokenizer.vocab_size} ids are more than the {rows} of the "
            "text encoder; are they of one model?"
        )


def notes_of_cuts(
    what: str, encoder: str, limit: int, removed: Sequence[str]
) -> list[str]:
    """Returns a line for each text that was longer than an encoder reads.

    Args:
        what: ``prompt`` or ``negative prompt``.
        encoder: Name of the text encoder.
        limit: Tokens that it reads.
        removed: The end of each text that it does not see, empty where there is none.
    """
    return [
        f"{what} {index + 1} is longer than the {limit} tokens of {encoder} and "
        f"was cut; not seen: {_shortened(text)}"
        for index, text in enumerate(removed)
        if text
    ]


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
