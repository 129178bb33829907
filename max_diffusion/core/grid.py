"""How the image tokens of one sample are arranged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Grid:
    """The image tokens of one sample, in the order frames, rows, columns."""

    frames: int
    """Number of latent frames; 1 for an image."""
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """Number of image tokens of one sample."""
        return self.frames * self.rows * self.columns
