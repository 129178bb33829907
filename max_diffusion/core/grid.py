"""Where image tokens lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Grid:
    """The image tokens of one sample, in the order frames, rows, columns."""

    frames: int
    """Latent frames; 1 of an image."""
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.frames * self.rows * self.columns
