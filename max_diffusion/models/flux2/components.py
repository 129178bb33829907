"""FLUX.2's components beside the autoencoder: its transformer and text encoder."""

from __future__ import annotations

from typing import final

from graphs.flux2 import Flux2Denoiser

from ...components import CausalLMTextEncoder
from ...denoising import DenoiserComponent
from .config import flux2_config


@final
class Flux2Transformer(DenoiserComponent):
    """The FLUX.2 denoiser; every step graph comes from the base class."""

    def denoiser(self) -> Flux2Denoiser:
        """Creates the pieces at this checkpoint's sizes."""
        config = flux2_config(self.config)
        return Flux2Denoiser(config, self.dtype, self.device_ref)


@final
class Flux2KleinTextEncoder(CausalLMTextEncoder):
    """Qwen3: states of three layers side by side, those of padding, too."""

    output_layers = (9, 18, 27)
    keeps_padding = True


@final
class Flux2TextEncoder(CausalLMTextEncoder):
    """Mistral: states of three layers side by side, those of padding before texts, too.

    What it sees with is not loaded.
    """

    output_layers = (10, 20, 30)
    keeps_padding = True
    pads_before = True
