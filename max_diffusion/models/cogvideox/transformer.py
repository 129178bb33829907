"""CogVideoX's transformer as a component of its pipeline."""

from __future__ import annotations

from typing import final

from graphs.cogvideox import CogVideoXDenoiser

from ...checkpoint import AbstractTensor, ComponentWeights
from ...denoising import DenoiserComponent
from .config import cogvideox_config


@final
class CogVideoXTransformer(DenoiserComponent):
    """The CogVideoX denoiser; every step graph comes from the base class."""

    def denoiser(self) -> CogVideoXDenoiser:
        """Creates the CogVideoX pieces at this checkpoint's sizes."""
        config = cogvideox_config(self.config)
        return CogVideoXDenoiser(config, self.dtype, self.device_ref)


def patches_as_rows(files: ComponentWeights, name: str) -> AbstractTensor:
    """Returns a weight, the patch filters ``(D, C, p, p)`` as a matrix ``(D, C p p)``.

    Tokens hold their cells channel by channel, so that one product embeds them.
    """
    found = files[name]
    if name == "patch_embed.proj.weight" and len(found.shape) == 4:
        return found.reshaped(found.shape[0], found.shape[1] * found.shape[2] ** 2)
    return found
