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
from ...pipelines.starting import packed_mask
from ..autoencoder_pictures import AutoencoderPictures, channels_last
from .options import Flux1KontextOptions

# Of the pictures that FLUX.1-Kontext was trained with: high ones, and a square.
_HIGH: Final = (
    *((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800)),
    *((1248, 832), (1184, 880), (1104, 944), (1024, 1024)),
)


class AbstractFlux1Pictures(AutoencoderPictures):
    """What all of them share beside the encoder."""

    @classmethod
    def known_channels(cls, vae: AutoencoderKLConfig) -> int:
        """Channels that the transformer reads of a picture beside the latents."""
        return 0


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
        posterior = channels_last(noise.once(cells))
        mask = None
        if inputs.mask is not None:
            tokens = packed_mask(inputs, self.cell, size)
            mask = np.tile(tokens, self.vae.latent_channels)
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
        read = self._preferred if is_scaled else self.rounded
        found = (read(*size) for size in sizes)
        return tuple(Grid(1, h // self.cell, w // self.cell) for h, w in found)

    def start(
        self,
        request: GenerationRequest,
        inputs: PictureInputs,
        grid: Grid,
        references: tuple[Grid, ...],
    ) -> tuple[np.ndarray, GivenPictures]:
        """Draws the latents' noise alone: of the picture the mode is taken."""
        [reference] = references
        pixels = inputs.images[0].scaled(*self.size(reference))
        noise = request.noise().randn(self.latents_shape(grid))
        given = GivenPictures(references=(self.mode_of(pixels, reference),))
        return packed_cells(noise), given

    def _preferred(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that the model knows, of the nearest shape."""
        rounded = self.rounded(height, width)
        return self.rounded(*nearest_in_shape(*rounded, self.preferred_sizes))


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
        start = PictureToEncode(pixels, channels_last(noise.once(cells)))
        latents = packed_cells(noise.randn(cells))
        marked = inputs.mask.marked(*size).astype(np.float32)
        masked = PictureToEncode(
            pixels * (1 - marked[..., None]), channels_last(noise.once(cells))
        )
        scale = self.scale
        # Rows and columns within a cell come first in a token, then the cell's own.
        cut = marked.reshape(grid.rows, 2, scale, grid.columns, 2, scale)
        mask = cut.transpose(0, 3, 2, 5, 1, 4).reshape(grid.num_tokens, -1)
        return latents, GivenPictures(start=start, known=KnownPicture(masked, mask))
