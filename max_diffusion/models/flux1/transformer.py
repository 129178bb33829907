"""FLUX.1's transformer as a component of its pipeline."""

from __future__ import annotations

from typing import final

from graphs.flux1 import Flux1Denoiser

from ...denoising import DenoiserComponent
from .config import flux1_config


@final
class Flux1Transformer(DenoiserComponent):
    """The FLUX.1 denoiser; every step graph comes from the base class."""

    def denoiser(self) -> Flux1Denoiser:
        """Creates the FLUX.1 pieces at this checkpoint's sizes."""
        return Flux1Denoiser(flux1_config(self.config), self.dtype, self.device_ref)
