"""How the image tokens of one sample are arranged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Frames:
    """The frames of one sample."""

    count: int = 1
    """Number of frames that are drawn; 1 of an image."""
    latent_count: int = 1
    """Number of frames of the grid of tokens, which may be fewer."""
    fps: float | None = None
    """Frames a second; ``None`` of an image."""


@final
@dataclass(frozen=True)
class Grid:
    """The image tokens of one sample, in the order frames, rows, columns."""

    frames: int
    """Number of latent frames; 1 for an image."""
    rows: int
    columns: int
    cells: tuple[int, int, int] = (1, 1, 1)
    """Latent frames, rows and columns that a token holds, where they are what
    frequencies are of; its channels are theirs one after the other."""

    @property
    def num_tokens(self) -> int:
        """Number of image tokens of one sample."""
        return self.frames * self.rows * self.columns
