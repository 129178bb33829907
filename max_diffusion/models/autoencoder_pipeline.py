"""Pipelines whose autoencoder is an ``AutoencoderKL``."""

from __future__ import annotations

import numpy as np
from max.driver import Buffer

from ..components import AutoencoderKLDecoder
from ..core.request import GenerationContext
from ..pipelines import TextToImagePipeline


class AutoencoderPipeline(TextToImagePipeline):
    """Decodes by its component ``vae``, an ``AutoencoderKLDecoder``."""

    def decode(self, context: GenerationContext, latents: Buffer) -> np.ndarray:
        """Decodes ``(B, S_img, C)`` to uint8 ``(B, 1, H, W, 3)``, in one go."""
        return self._decoder().frames(latents, context.grid)

    def decode_bytes(self, height: int, width: int, num_frames: int) -> int:
        """Returns the bytes that :meth:`decode` takes per image while it runs."""
        return num_frames * height * width * self._decoder().bytes_per_pixel

    def _decoder(self) -> AutoencoderKLDecoder:
        decoder = self.loaded["vae"]
        assert isinstance(decoder, AutoencoderKLDecoder)
        return decoder
