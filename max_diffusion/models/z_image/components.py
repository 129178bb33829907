"""Z-Image's components, beside the autoencoder: its transformer and text encoder."""

from __future__ import annotations

from typing import final

from graphs.z_image import ZImageDenoiser

from ...components import CausalLMTextEncoder
from ...denoising import DenoiserComponent
from .config import z_image_config


@final
class ZImageTransformer(DenoiserComponent):
    """The Z-Image denoiser; every step graph comes from the base class."""

    def denoiser(self) -> ZImageDenoiser:
        """Creates the pieces at this checkpoint's sizes."""
        config = z_image_config(self.config)
        return ZImageDenoiser(config, self.dtype, self.device_ref)


@final
class ZImageTextEncoder(CausalLMTextEncoder):
    """Qwen3: states before its last layer."""

    output_layers = (-2,)
