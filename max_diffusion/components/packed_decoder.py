"""The decoder half of an autoencoder: from packed latents to images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, Module, TensorType, TensorValue

from graphs.latents import decoder_grids
from graphs.weights import WeightScope

from ..core.buffers import to_device, to_numpy
from ..core.grid import Grid
from ..execution.component import ComponentModel


class PackedDecoder(ComponentModel):
    """Decodes packed latents; a subclass says by what network."""

    @property
    @abstractmethod
    def num_levels(self) -> int:
        """Sizes from latents to images, each twice the one before."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of a latent cell."""

    @abstractmethod
    def decoded(self, w: WeightScope, *inputs: TensorValue) -> TensorValue:
        """Packed latents and grids to uint8 ``(B, H, W, 3)``, as nodes of a graph."""

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds ``decode``: packed latents ``(B, S_img, C)`` to uint8 NHWC."""
        scope = self.weight_scope()
        latents = TensorType(
            DType.float32,
            ("batch", "image_seq_len", 4 * self.latent_channels),
            self.device_ref,
        )
        types = [latents, *decoder_grids(self.num_levels, self.device_ref).values()]
        with Graph(f"{self.name}.decode", input_types=types, module=module) as graph:
            graph.output(self.decoded(scope, *(x.tensor for x in graph.inputs)))
        return scope

    def load_model(self) -> Callable[..., Any]:
        """Returns :meth:`decode`, which runs the loaded graph."""
        return self.decode

    def decode(self, latents: Buffer, rows: int, columns: int) -> Buffer:
        """Decodes float32 ``(B, rows * columns, C)`` to uint8 ``(B, H, W, 3)``."""
        levels = range(1, 1 + self.num_levels)
        shapes = [(rows * 2**level, columns * 2**level) for level in (0, *levels)]
        grids = [to_device(np.zeros(shape, np.int8), self.device) for shape in shapes]
        return self.models[f"{self.name}.decode"].execute(latents, *grids)[0]

    def frames(self, latents: Buffer, grid: Grid) -> np.ndarray:
        """Decodes ``(B, S_img, C)`` to images, each a frame: ``(B, 1, H, W, 3)``."""
        images = to_numpy(self.decode(latents, grid.rows, grid.columns))
        return images[:, None].copy()
