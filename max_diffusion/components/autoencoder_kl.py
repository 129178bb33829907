"""The halves of an ``AutoencoderKL``: packed latents to images, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, final

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, Module, TensorType

from graphs.autoencoder_kl import (
    AutoencoderKLConfig,
    decode_packed,
    decoder_grids,
    encode_packed,
    encoder_grids,
)
from graphs.weights import WeightScope

from ..core.buffers import to_device
from ..execution.component import ComponentModel
from ..sampling import KeptPicture
from .config import require_one_of, select_fields


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
class AutoencoderKLDecoder(ComponentModel):
    """Decodes packed latents to images."""

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds ``decode``: packed latents ``(B, S_img, C)`` to uint8 NHWC."""
        scope = self.weight_scope()
        latents = TensorType(
            DType.float32,
            ("batch", "image_seq_len", 4 * self._sizes.latent_channels),
            self.device_ref,
        )
        types = [latents, *decoder_grids(self._sizes, self.device_ref).values()]
        with Graph(f"{self.name}.decode", input_types=types, module=module) as graph:
            inputs = [value.tensor for value in graph.inputs]
            graph.output(decode_packed(self._sizes, scope, *inputs))
        return scope

    @cached_property
    def _sizes(self) -> AutoencoderKLConfig:
        return autoencoder_config(self.config)

    def load_model(self) -> Callable[..., Any]:
        """Returns :meth:`decode`, which runs the loaded graph."""
        return self.decode

    def decode(self, latents: Buffer, rows: int, columns: int) -> Buffer:
        """Decodes float32 ``(B, rows * columns, C)`` to uint8 ``(B, H, W, 3)``."""
        levels = range(1, 1 + len(self._sizes.block_out_channels))
        shapes = [(rows * 2**level, columns * 2**level) for level in (0, *levels)]
        grids = [to_device(np.zeros(shape, np.int8), self.device) for shape in shapes]
        return self.models[f"{self.name}.decode"].execute(latents, *grids)[0]


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
