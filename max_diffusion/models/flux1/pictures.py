"""How FLUX.1's models use the pictures of a request: as diffusers' pipelines do.

| model | picture | mask | pipeline of diffusers |
|---|---|---|---|
| FLUX.1 | noised, to start from | what is put back after each step | image to image, inpainting |
| Kontext | tokens behind those that are drawn | | Kontext |
| Fill | noised, and channels beside the latents | channels, too | Fill |
"""  # noqa: E501  # a row of the table is a line

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import numpy as np

from graphs.autoencoder_kl import AutoencoderKLConfig

from ...components import AutoencoderKLEncoder
from ...core.buffers import to_numpy
from ...core.grid import Grid
from ...core.noise import packed_cells
from ...core.options import RequestOptions
from ...core.pictures import PictureInputs, nearest_in_shape
from ...core.request import (
    GenerationRequest,
    GivenPictures,
    KnownPicture,
    PictureToEncode,
)
from ...errors import RequestError
from ...pipelines.starting import AbstractPictures, packed_mask
from .options import Flux1KontextOptions

# Of the pictures that FLUX.1-Kontext was trained with: high ones, and a square.
_HIGH: Final = (
    *((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800)),
    *((1248, 832), (1184, 880), (1104, 944), (1024, 1024)),
)


class AbstractFlux1Pictures(AbstractPictures):
    """What all of them share: the encoder, and the sizes of its latents.

    Args:
        encoder: The autoencoder's other half.
        vae: Its sizes.
    """

    def __init__(self, encoder: AutoencoderKLEncoder, vae: AutoencoderKLConfig) -> None:
        self._encoder, self._vae = encoder, vae
        self._scale = 2 ** (len(vae.block_out_channels) - 1)
        self._cell = 2 * self._scale

    @classmethod
    def known_channels(cls, vae: AutoencoderKLConfig) -> int:
        """Channels that the transformer reads of a picture beside the latents."""
        return 0

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
        return self._vae.latent_channels, 2 * grid.rows, 2 * grid.columns

    def size(self, grid: Grid) -> tuple[int, int]:
        """Returns the height and width in pixels of a grid of tokens."""
        return grid.rows * self._cell, grid.columns * self._cell


@final
class Flux1Pictures(AbstractFlux1Pictures):
    """Noises a picture's latents, and keeps what a mask says at each step."""

    taken = frozenset(("image", "mask", "strength"))

    def start(
        self,
        request: GenerationRequest,
        inputs: PictureInputs,
        grid: Grid,
        references: tuple[Grid, ...],
    ) -> tuple[np.ndarray, GivenPictures]:
        """Draws what diffusers draws: the encoder's noise first, then the latents'."""
        size, cells = self.size(grid), self.latents_shape(grid)
        noise = request.noise()
        posterior = _channels_last(noise.once(cells))
        mask = None
        if inputs.mask is not None:
            tokens = packed_mask(inputs, self._cell, size)
            mask = np.tile(tokens, self._vae.latent_channels)
        start = PictureToEncode(inputs.images[0].scaled(*size), posterior)
        given = GivenPictures(start=start, kept_mask=mask)
        return packed_cells(noise.randn(cells)), given


@final
class KontextPictures(AbstractFlux1Pictures):
    """Has the transformer read a reference picture behind the tokens it draws.

    One only: the released model was trained with one. For several, the paper numbers
    them by their first position, ComfyUI lays them side by side in the other two, and
    most stitch them in one picture; only the last is what the model knows.

    References:
        Black Forest Labs, "FLUX.1 Kontext: Flow Matching for In-Context Image
        Generation and Editing in Latent Space", 2025, arXiv:2506.15742.
    """

    taken = frozenset(("image",))
    preferred_sizes = (*_HIGH, *((high, wide) for wide, high in _HIGH[:-1]))
    instead_of_more = "it was trained with one, so put them side by side in one"

    def drawn_size(
        self,
        request: GenerationRequest,
        options: RequestOptions,
        default: tuple[int, int],
        cell: int,
    ) -> tuple[int | None, int | None]:
        """Of a request that leaves both open the size that its picture is read at."""
        assert isinstance(options, Flux1KontextOptions)
        height, width, inputs = request.height, request.width, request.inputs
        if inputs is None and options.auto_resize is not None:
            raise RequestError(
                "request: auto_resize is of a reference picture, and there is none; "
                "bring an image, or leave it out"
            )
        is_free = height is None and width is None
        if inputs is not None and is_free and options.auto_resize is not False:
            image = inputs.images[0]
            height, width = self._preferred(image.height, image.width)
        elif inputs is not None and None in (height, width):
            area = default[0] * default[1]
            height, width = inputs.default_size(area, cell, height, width)
        if options.max_area is None:
            return height, width
        aspect = (width or default[1]) / (height or default[0])
        areas = options.max_area / aspect, options.max_area * aspect
        high, wide = (round(area**0.5) // cell * cell for area in areas)
        if min(high, wide) < cell:
            raise RequestError(
                f"request: max_area of {options.max_area} pixels would be less than "
                f"{cell} a side in this shape; give more"
            )
        return high, wide

    def references(
        self, sizes: Sequence[tuple[int, int]], options: RequestOptions
    ) -> tuple[Grid, ...]:
        """Where the reference's tokens lie."""
        assert isinstance(options, Flux1KontextOptions)
        is_scaled = options.auto_resize is not False
        read = self._preferred if is_scaled else self._rounded
        found = (read(*size) for size in sizes)
        return tuple(Grid(1, h // self._cell, w // self._cell) for h, w in found)

    def start(
        self,
        request: GenerationRequest,
        inputs: PictureInputs,
        grid: Grid,
        references: tuple[Grid, ...],
    ) -> tuple[np.ndarray, GivenPictures]:
        """Draws the latents' noise alone: of the picture the mode is taken."""
        [reference] = references
        channels, height, width = self.latents_shape(reference)
        pixels = inputs.images[0].scaled(*self.size(reference))
        mode = np.zeros((1, height, width, channels), np.float32)
        noise = request.noise().randn(self.latents_shape(grid))
        given = GivenPictures(references=(PictureToEncode(pixels, mode),))
        return packed_cells(noise), given

    def _rounded(self, height: int, width: int) -> tuple[int, int]:
        """A picture's height and width in whole tokens."""
        cell = self._cell
        if min(height, width) < cell:
            raise RequestError(
                f"request: image of {width} x {height} is less than the {cell} pixels "
                "a side of a token; take a larger one"
            )
        return height // cell * cell, width // cell * cell

    def _preferred(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that the model knows, of the nearest shape."""
        rounded = self._rounded(height, width)
        return self._rounded(*nearest_in_shape(*rounded, self.preferred_sizes))


@final
class FillPictures(AbstractFlux1Pictures):
    """Has the transformer read the picture without its masked part, and the mask.

    Both are channels beside the latents of each token: the latents of the picture, gray
    where the mask marks it, and all pixels of the mask.
    """

    taken = frozenset(("image", "mask", "strength"))
    needed = frozenset(("image", "mask"))
    default_strength = 1.0

    @classmethod
    def known_channels(cls, vae: AutoencoderKLConfig) -> int:
        """Those of the latents, and the mask's pixels, of a token."""
        cell = 2 * 2 ** (len(vae.block_out_channels) - 1)
        return 4 * vae.latent_channels + cell * cell

    def start(
        self,
        request: GenerationRequest,
        inputs: PictureInputs,
        grid: Grid,
        references: tuple[Grid, ...],
    ) -> tuple[np.ndarray, GivenPictures]:
        """Draws for the picture, the latents and the masked picture, in this order."""
        assert inputs.mask is not None, "needed"
        size, cells = self.size(grid), self.latents_shape(grid)
        noise = request.noise()
        pixels = inputs.images[0].scaled(*size)
        start = PictureToEncode(pixels, _channels_last(noise.once(cells)))
        latents = packed_cells(noise.randn(cells))
        marked = inputs.mask.marked(*size).astype(np.float32)
        masked = PictureToEncode(
            pixels * (1 - marked[..., None]), _channels_last(noise.once(cells))
        )
        scale = self._scale
        # Rows and columns within a cell come first in a token, then the cell's own.
        cut = marked.reshape(grid.rows, 2, scale, grid.columns, 2, scale)
        mask = cut.transpose(0, 3, 2, 5, 1, 4).reshape(grid.num_tokens, -1)
        return latents, GivenPictures(start=start, known=KnownPicture(masked, mask))


def _channels_last(cells: np.ndarray) -> np.ndarray:
    """``(B, C, h, w)`` to ``(B, h, w, C)``."""
    return np.ascontiguousarray(cells.transpose(0, 2, 3, 1))
