"""How FLUX.2 uses the pictures of a request: as tokens behind those that are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, final

import numpy as np

from ...core.grid import Grid
from ...core.options import RequestOptions
from ...core.pictures import PictureInputs
from ...core.request import GenerationRequest, GivenPictures
from ..autoencoder_pictures import AutoencoderPictures
from .noise import packed_noise

# A reference of more pixels is scaled to as many.
_MOST_PIXELS: Final = 1024 * 1024


@final
class Flux2Pictures(AutoencoderPictures):
    """Has the transformer read reference pictures behind the tokens it draws.

    Each at its own size, rounded down by leaving out its edges.
    """

    taken = frozenset(("image",))
    max_pictures = 10
    instead_of_more = "send fewer"
    most_read_pixels = _MOST_PIXELS

    def references(
        self, sizes: Sequence[tuple[int, int]], options: RequestOptions
    ) -> tuple[Grid, ...]:
        """Where the references' tokens lie."""
        found = (self.rounded(*_limited(*size)) for size in sizes)
        return tuple(Grid(1, h // self.cell, w // self.cell) for h, w in found)

    def start(
        self,
        request: GenerationRequest,
        inputs: PictureInputs,
        grid: Grid,
        references: tuple[Grid, ...],
    ) -> tuple[np.ndarray, GivenPictures]:
        """Draws the latents' noise alone: of the pictures the mean is taken."""
        found = []
        for image, reference in zip(inputs.images, references, strict=True):
            pixels = image.scaled(*_limited(image.height, image.width))
            found.append(
                self.mode_of(_cropped(pixels, self.size(reference)), reference)
            )
        noise = packed_noise(request, grid, self.vae.latent_channels)
        return noise, GivenPictures(references=tuple(found))


def _limited(height: int, width: int) -> tuple[int, int]:
    """A picture's height and width, or those of the most pixels in its shape."""
    if height * width <= _MOST_PIXELS:
        return height, width
    factor = math.sqrt(_MOST_PIXELS / (width * height))
    return int(height * factor), int(width * factor)


def _cropped(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of ``(1, H, W, 3)``, of a height and width."""
    top, left = (
        (own - wanted) // 2 for own, wanted in zip(pixels.shape[1:3], size, strict=True)
    )
    return np.ascontiguousarray(pixels[:, top : top + size[0], left : left + size[1]])
