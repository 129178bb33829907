"""How FLUX.1 starts from a picture: as diffusers' image-to-image and inpainting do."""

from __future__ import annotations

from typing import final

import numpy as np

from graphs.autoencoder_kl import AutoencoderKLConfig

from ...components import AutoencoderKLEncoder
from ...core.buffers import to_numpy
from ...core.grid import Grid
from ...core.noise import packed_cells
from ...core.pictures import PictureInputs
from ...core.request import GenerationRequest, StartingPicture
from ...errors import RequestError
from ...pipelines.starting import AbstractPictures, packed_mask


@final
class Flux1Pictures(AbstractPictures):
    """Noises a picture's latents, and keeps what a mask says at each step.

    Args:
        encoder: The autoencoder's other half.
        vae: Its sizes.
    """

    taken = frozenset(("image", "mask", "strength"))

    def __init__(self, encoder: AutoencoderKLEncoder, vae: AutoencoderKLConfig) -> None:
        self._encoder, self._vae = encoder, vae
        self._cell = 2 * 2 ** (len(vae.block_out_channels) - 1)

    def check_weights(self) -> None:
        """Refuses pictures where the files have only the autoencoder's decoder."""
        if not self._encoder.has_weights:
            raise RequestError(
                "request: image needs the model's encoder, but the files of its vae "
                "hold a decoder only; take the folder of the whole model"
            )

    def start(
        self, request: GenerationRequest, inputs: PictureInputs, grid: Grid
    ) -> tuple[np.ndarray, StartingPicture]:
        """Draws what diffusers draws: the encoder's noise first, then the latents'."""
        size = grid.rows * self._cell, grid.columns * self._cell
        cells = self._vae.latent_channels, 2 * grid.rows, 2 * grid.columns
        noise = request.noise()
        posterior = noise.once(cells).transpose(0, 2, 3, 1)
        mask = None
        if inputs.mask is not None:
            tokens = packed_mask(inputs, self._cell, size)
            mask = np.tile(tokens, self._vae.latent_channels)
        pixels = inputs.images[0].scaled(*size)
        start = StartingPicture(pixels, np.ascontiguousarray(posterior), mask)
        return packed_cells(noise.randn(cells)), start

    def encode(self, start: StartingPicture) -> np.ndarray:
        """Draws the picture's latents, float32 ``(1 or B, S_img, 4 C)``."""
        return to_numpy(self._encoder.encode(start.pixels, start.posterior))

    def encode_bytes(self, height: int, width: int) -> int:
        """Returns the bytes that :meth:`encode` takes while it runs."""
        return height * width * self._encoder.bytes_per_pixel
