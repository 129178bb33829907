"""FLUX.2's noise."""

from __future__ import annotations

import numpy as np

from ...core.grid import Grid
from ...core.request import GenerationRequest


def packed_noise(
    request: GenerationRequest, grid: Grid, latent_channels: int
) -> np.ndarray:
    """Draws diffusers' noise for the seeds, which is of packed cells from the start.

    Returns:
        float32 ``(B, S_img, 4 C)``.
    """
    cells = request.noise().randn((4 * latent_channels, grid.rows, grid.columns))
    tokens = cells.reshape(*cells.shape[:2], -1)
    return np.ascontiguousarray(tokens.transpose(0, 2, 1))
