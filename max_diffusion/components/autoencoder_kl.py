"""The decoder of an ``AutoencoderKL``: from packed latents to images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, final

from max.graph import TensorValue

from graphs.autoencoder_kl import AutoencoderKLConfig, decode_packed
from graphs.weights import WeightScope

from .config import require_one_of, select_fields
from .packed_decoder import PackedDecoder


def autoencoder_config(config: Mapping[str, Any]) -> AutoencoderKLConfig:
    """Returns the sizes of an ``AutoencoderKL`` from its ``config.json``."""
    require_one_of("vae", "act_fn", config.get("act_fn", "silu"), ("silu",))
    for key, block in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        for kind in config.get(key, ()):
            require_one_of("vae", key, kind, (block,))
    known = {key: value for key, value in config.items() if value is not None}
    return select_fields(AutoencoderKLConfig, known, "vae")


@final
class AutoencoderKLDecoder(PackedDecoder):
    """Decodes packed latents to images."""

    @cached_property
    def _sizes(self) -> AutoencoderKLConfig:
        return autoencoder_config(self.config)

    @property
    def num_levels(self) -> int:
        """Sizes from latents to images."""
        return len(self._sizes.block_out_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent cell."""
        return self._sizes.latent_channels

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes that decoding takes for each pixel while it runs.

        At its widest, a residual block holds its input and two tensors of its output's
        channels on a CPU, in float32 at most; on a GPU three of its input's and one of
        its output's. For the demo model these and the image are 274 bytes a pixel on a
        CPU; 312 were measured at 1024 x 1024, with what MAX keeps from one run to the
        next, for which half as much again is counted.
        """
        widths = self._sizes.block_out_channels
        entering = (*widths[1:], widths[-1])
        is_host = self.device.is_host
        of_input, of_output = (1, 2) if is_host else (3, 1)
        channels = max(
            (of_input * before + of_output * after) / 4**level
            for level, (before, after) in enumerate(zip(entering, widths, strict=True))
        )
        size = 4 if is_host else self.dtype.size_in_bytes
        return (math.ceil(channels * size) + 4 * 3 + 2 * 3) * 3 // 2

    def decoded(self, w: WeightScope, *inputs: TensorValue) -> TensorValue:
        """Packed latents and grids to uint8 ``(B, H, W, 3)``."""
        return decode_packed(self._sizes, w, *inputs)
