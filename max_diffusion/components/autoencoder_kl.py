"""The decoder of an ``AutoencoderKL``: from packed latents to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, final

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, Module, TensorType

from graphs.autoencoder_kl import AutoencoderKLConfig, decode_packed, decoder_grids
from graphs.weights import WeightScope

from ..core.buffers import to_device
from ..execution.component import ComponentModel
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
