"""Pictures of models whose autoencoder is an ``AutoencoderKL``."""

from __future__ import annotations

import numpy as np

from graphs.autoencoder_kl import AutoencoderKLConfig

from ..components import AutoencoderKLEncoder
from ..core.buffers import to_numpy
from ..core.grid import Grid
from ..core.request import PictureToEncode
from ..errors import RequestError
from ..pipelines.starting import AbstractPictures


class AutoencoderPictures(AbstractPictures):
    """Encodes pictures, and knows the sizes of their latents.

    Args:
        encoder: The autoencoder's other half.
        vae: Its sizes.
    """

    def __init__(self, encoder: AutoencoderKLEncoder, vae: AutoencoderKLConfig) -> None:
        self._encoder, self.vae = encoder, vae
        self.scale = 2 ** (len(vae.block_out_channels) - 1)
        self.cell = 2 * self.scale

    def check_weights(self) -> None:
        """Refuses pictures where the files have only the autoencoder's decoder."""
        if not self._encoder.has_weights:
            raise RequestError(
                "request: image needs the model's encoder, but the files of its vae "
                "hold a decoder only; take the folder of the whole model"
            )

    def encode(self, picture: PictureToEncode) -> np.ndarray:
        """Draws the picture's latents, float32 ``(1 or B, S, 4 C)``."""
        return to_numpy(self._encoder.encode(picture.pixels, picture.posterior))

    def encode_bytes(self, height: int, width: int) -> int:
        """Returns the bytes that :meth:`encode` takes while it runs."""
        return height * width * self._encoder.bytes_per_pixel

    def latents_shape(self, grid: Grid) -> tuple[int, int, int]:
        """Returns the latents' ``(C, h, w)`` that noise is drawn for."""
        return self.vae.latent_channels, 2 * grid.rows, 2 * grid.columns

    def size(self, grid: Grid) -> tuple[int, int]:
        """Returns the height and width in pixels of a grid of tokens."""
        return grid.rows * self.cell, grid.columns * self.cell

    def mode_of(self, pixels: np.ndarray, grid: Grid) -> PictureToEncode:
        """Returns a picture of whose latents the mean is taken.

        Args:
            pixels: float32 ``(1, H, W, 3)`` in -1..1.
            grid: Of its tokens.
        """
        channels, height, width = self.latents_shape(grid)
        nothing = np.zeros((1, height, width, channels), np.float32)
        return PictureToEncode(pixels, nothing)

    def rounded(self, height: int, width: int) -> tuple[int, int]:
        """Returns a picture's height and width in whole tokens.

        Raises:
            RequestError: It is less than one.
        """
        cell = self.cell
        if min(height, width) < cell:
            raise RequestError(
                f"request: image of {width} x {height} is less than the {cell} pixels "
                "a side of a token; take a larger one"
            )
        return height // cell * cell, width // cell * cell


def channels_last(cells: np.ndarray) -> np.ndarray:
    """``(B, C, h, w)`` to ``(B, h, w, C)``."""
    return np.ascontiguousarray(cells.transpose(0, 2, 3, 1))
