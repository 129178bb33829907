"""The halves of an ``AutoencoderKL``: packed latents to images, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, Module, TensorType, TensorValue

from graphs.autoencoder_kl import (
    AutoencoderKLConfig,
    decode_packed,
    encode_packed,
    encoder_grids,
)
from graphs.weights import WeightScope

from ..core.buffers import to_device
from ..errors import ModelLoadError
from ..execution.component import ComponentModel
from ..sampling import KeptPicture
from .config import require_one_of, select_fields
from .packed_decoder import PackedDecoder


def autoencoder_config(config: Mapping[str, Any]) -> AutoencoderKLConfig:
    """Returns the sizes of an ``AutoencoderKL`` from its ``config.json``.

    Raises:
        ModelLoadError: It has blocks or patches that are not known, or a size of
            another type.
    """
    require_one_of("vae", "act_fn", config.get("act_fn", "silu"), ("silu",))
    for key, block in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        for kind in config.get(key, ()):
            require_one_of("vae", key, kind, (block,))
    known = {key: value for key, value in config.items() if value is not None}
    if "batch_norm_eps" in known:
        patch = list(known.get("patch_size", (2, 2)))
        require_one_of("vae", "patch_size", str(patch), ("[2, 2]",))
        known |= {"scaling_factor": 1.0, "shift_factor": 0.0}
    sizes = select_fields(AutoencoderKLConfig, known, "vae")
    if sizes.batch_norm_eps is not None and not 0 <= sizes.batch_norm_eps < 1:
        raise ModelLoadError(
            f"vae: batch_norm_eps must be in [0, 1), got {sizes.batch_norm_eps:g}"
        )
    if len(sizes.decoder_widths) != len(sizes.block_out_channels):
        raise ModelLoadError(
            "vae: decoder_block_out_channels must be as many as block_out_channels, "
            f"got {sizes.decoder_block_out_channels} and {sizes.block_out_channels}"
        )
    return sizes


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

        For the demo model what is counted once is 274 bytes a pixel on a CPU; 312 were
        measured at 1024 x 1024.
        """
        widths = self._sizes.decoder_widths
        return _pixel_bytes(widths, (*widths[1:], widths[-1]), self)

    def decoded(self, w: WeightScope, *inputs: TensorValue) -> TensorValue:
        """Packed latents and grids to uint8 ``(B, H, W, 3)``."""
        return decode_packed(self._sizes, w, *inputs)


@final
class AutoencoderKLEncoder(ComponentModel):
    """Encodes a picture to packed latents."""

    @property
    def has_weights(self) -> bool:
        """Whether the files have this half of the autoencoder at all."""
        return "encoder.conv_in.weight" in self.weights.tensors

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds ``encode``: a picture and noise to packed latents.

        And what requests with a mask do after each step, since a module of its own
        would take as long to compile as this one.
        """
        scope, sizes = self.weight_scope(), self._sizes
        depth = len(sizes.block_out_channels) - 1
        cells = (f"height_{depth}", f"width_{depth}", sizes.latent_channels)
        types = [
            TensorType(
                DType.float32, (1, "height_0", "width_0", 3), device=self.device_ref
            ),
            TensorType(DType.float32, ("batch", *cells), device=self.device_ref),
            *encoder_grids(sizes, self.device_ref).values(),
        ]
        with Graph(f"{self.name}.encode", input_types=types, module=module) as graph:
            inputs = [value.tensor for value in graph.inputs]
            graph.output(encode_packed(sizes, scope, *inputs))
        KeptPicture.add_graphs(module, self.device_ref)
        return scope

    @cached_property
    def _sizes(self) -> AutoencoderKLConfig:
        return autoencoder_config(self.config)

    @property
    def bytes_per_pixel(self) -> int:
        """Bytes that encoding takes for each pixel while it runs.

        A block's input has the channels of the level before.
        """
        widths = self._sizes.block_out_channels
        return _pixel_bytes(widths, (widths[0], *widths[:-1]), self)

    def load_model(self) -> Callable[..., Any]:
        """Returns :meth:`encode`, which runs the loaded graph."""
        return self.encode

    def encode(self, picture: np.ndarray, noise: np.ndarray) -> Buffer:
        """Draws a picture's latents.

        Args:
            picture: float32 ``(1, H, W, 3)`` in -1..1; both sides are multiples of an
                image token's.
            noise: Standard normal, float32 ``(B, h, w, C)``; zeros give the mean.

        Returns:
            float32 ``(B, S_img, 4 C)``.
        """
        height, width = picture.shape[1:3]
        levels = range(len(self._sizes.block_out_channels))
        shapes = [(height >> level, width >> level) for level in levels]
        shapes.insert(0, (shapes[-1][0] // 2, shapes[-1][1] // 2))
        inputs = [
            to_device(array, self.device)
            for array in (
                picture,
                noise,
                *(np.zeros(shape, np.int8) for shape in shapes),
            )
        ]
        return self.models[f"{self.name}.encode"].execute(*inputs)[0]


def _pixel_bytes(
    widths: Sequence[int], entering: Sequence[int], component: ComponentModel
) -> int:
    """Bytes a pixel that half of an autoencoder takes while it runs.

    At its widest, a residual block holds its input and two tensors of its output's
    channels on a CPU, in float32 at most; on a GPU three of its input's and one of its
    output's. Half as much again is counted for what MAX keeps from one run to the next.

    Args:
        widths: Channels of the blocks at each level, pixels first.
        entering: Channels of the widest block's input at each level.
        component: What runs.
    """
    is_host = component.device.is_host
    of_input, of_output = (1, 2) if is_host else (3, 1)
    channels = max(
        (of_input * before + of_output * after) / 4**level
        for level, (before, after) in enumerate(zip(entering, widths, strict=True))
    )
    size = 4 if is_host else component.dtype.size_in_bytes
    return (math.ceil(channels * size) + 4 * 3 + 2 * 3) * 3 // 2
