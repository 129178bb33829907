"""Qwen-Image's components: its transformer, text encoder and decoder."""

from __future__ import annotations

from functools import cached_property
from typing import Final, final

from max.graph import TensorValue

from graphs.autoencoder_qwen_image import QwenImageDecoderConfig, decode_packed
from graphs.qwen_image import QwenImageDenoiser
from graphs.weights import WeightScope

from ...components import CausalLMTextEncoder, PackedDecoder
from ...denoising import DenoiserComponent
from .config import decoder_config, qwen_image_config

NUM_DROPPED: Final = 34
"""Tokens of the template before the prompt, whose states the transformer never sees;
diffusers drops this many of any vocabulary."""


@final
class QwenImageTransformer(DenoiserComponent):
    """The Qwen-Image denoiser; every step graph comes from the base class."""

    def denoiser(self) -> QwenImageDenoiser:
        """Creates the pieces at this checkpoint's sizes."""
        config = qwen_image_config(self.config)
        return QwenImageDenoiser(config, self.dtype, self.device_ref)


@final
class QwenImageTextEncoder(CausalLMTextEncoder):
    """Qwen2.5-VL's language model: states after its final norm."""

    num_dropped = NUM_DROPPED


@final
class QwenImageDecoder(PackedDecoder):
    """Decodes packed latents to images."""

    @cached_property
    def _sizes(self) -> QwenImageDecoderConfig:
        return decoder_config(self.config)

    @property
    def num_levels(self) -> int:
        """Sizes from latents to images."""
        return len(self._sizes.dim_mult)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent cell."""
        return self._sizes.z_dim

    def decoded(self, w: WeightScope, *inputs: TensorValue) -> TensorValue:
        """Packed latents and grids to uint8 ``(B, H, W, 3)``."""
        return decode_packed(self._sizes, w, *inputs)
