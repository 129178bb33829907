"""CogVideoX's decoder as a component of its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, final

import numpy as np
from max.driver import Buffer
from max.graph import Graph, Module

from graphs.autoencoder_kl_cogvideox import (
    CAUSAL,
    ChunkIndices,
    CogVideoXDecoderConfig,
    chunk_lengths,
    chunk_types,
    decode_chunk,
)
from graphs.weights import WeightScope

from ...checkpoint import AbstractTensor, ComponentWeights
from ...core.buffers import to_device, to_numpy, zeros
from ...execution.component import ComponentModel
from .config import decoder_config

_FILTER: Final = ".weight."
_SHORTCUT: Final = ".conv_shortcut."
# What a convolution on a CPU writes of its input (graphs/kernels/convolution.mojo): so
# many bytes, or rows of all frames.
_STRIP: Final = 8 << 20
_ROWS: Final = 10


@final
class CogVideoXDecoder(ComponentModel):
    """Decodes latents of a video to its frames, a chunk at a time."""

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds ``decode``: a chunk's latents, and the chunk before, to frames."""
        scope, sizes = self.weight_scope(), self._sizes
        types = chunk_types(sizes, self.dtype, self.device_ref)
        with Graph(f"{self.name}.decode", input_types=types, module=module) as graph:
            inputs = [value.tensor for value in graph.inputs]
            graph.output(*decode_chunk(sizes, scope, inputs))
        return scope

    @cached_property
    def _sizes(self) -> CogVideoXDecoderConfig:
        return decoder_config(self.config)

    def load_model(self) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
        """Returns :meth:`decode`, which runs the loaded graph."""
        return self.decode

    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Decodes one video, chunk by chunk.

        Args:
            latents: As the transformer leaves them, float32 ``(F, h, w, C)``.

        Yields:
            uint8 frames ``(f, H, W, 3)``.
        """
        for outputs in self.chunks(latents):
            yield to_numpy(outputs[0]).copy()

    def chunks(self, latents: np.ndarray) -> Iterator[list[Buffer]]:
        """Yields of each chunk its frames, and what convolutions hand on.

        Args:
            latents: As for :meth:`decode`.
        """
        sizes, graph = self._sizes, self.models[f"{self.name}.decode"]
        scaled = (latents / np.float32(sizes.scaling_factor)).astype(np.float32)
        frames, height, width, _ = scaled.shape
        sides = [
            (height * 2**level, width * 2**level)
            for level in range(len(sizes.block_out_channels))
        ]
        carriers = [to_device(np.zeros(side, np.int8), self.device) for side in sides]
        kept = [
            zeros((CAUSAL, *sides[level], channels), self.dtype, self.device)
            for level, channels in sizes.convolutions
        ]
        start = 0
        for count in chunk_lengths(frames):
            at = ChunkIndices.of(sizes, count, is_first=start == 0)
            outputs: list[Buffer] = graph.execute(
                to_device(scaled[start : start + count], self.device),
                *carriers,
                *(to_device(index, self.device) for index in at.arrays),
                *kept,
            )
            yield outputs
            kept = outputs[1:]
            start += count

    def decode_bytes(self, frames: int, height: int, width: int) -> int:
        """Returns the bytes that :meth:`decode` takes while it runs, beside the video.

        What convolutions hand on, once from the chunk before and once for the next; and
        of the first chunk, the largest, what a residual block holds at its widest. On a
        CPU, that is its input, two of its results, rows that a convolution reads, and
        some to spare: measured were 0.8 to 1.05 of the sum.

        Args:
            frames: Of the latents.
            height: Of the latents.
            width: Of the latents.
        """
        sizes, size = self._sizes, self.dtype.size_in_bytes
        handed_on = 2 * sum(
            CAUSAL * height * width * 4**level * channels * size
            for level, channels in sizes.convolutions
        )
        chunk = ChunkIndices.of(sizes, chunk_lengths(frames)[0], is_first=True)
        counts = [chunk_lengths(frames)[0], *(each.size for each in chunk.doubled)]
        widths = sizes.block_out_channels[::-1]
        held = 0
        for level, (before, after) in enumerate(pairwise((widths[0], *widths))):
            count = counts[min(level, sizes.num_doublings)]
            pixels = count * height * width * 4**level
            if self.device.is_host:
                rows = _ROWS * (count + CAUSAL) * width * 2**level * before * 4
                of_pixel = (before + 2 * after) * size + 4 * after
                here = pixels * of_pixel + _STRIP + rows
            else:
                here = pixels * (4 * before * size + 2 * after * 4)
            held = max(held, here)
        pixels = height * width * 4 ** (len(widths) - 1)
        done = (
            3 * pixels * sum(chunk_lengths(frames)) * sizes.temporal_compression_ratio
        )
        return handed_on + held + 2 * done


def filters_by_frame(files: ComponentWeights, name: str) -> AbstractTensor:
    """Returns a weight as the decoder's graphs ask for it.

    ``x.weight.i`` is frame ``i`` of the filters ``x.weight``, ``(O, I, 3, 3)`` of
    ``(O, I, 3, 3, 3)``; of filters of one place, those of norms are matrices.
    """
    stem, found, index = name.rpartition(_FILTER)
    if found and index.isdecimal():
        whole = files[f"{stem}.weight"]
        frame = whole.sliced(2, int(index), int(index) + 1)
        return frame.reshaped(*whole.shape[:2], *whole.shape[3:])
    tensor: Any = files[name]
    if len(tensor.shape) == 5 and set(tensor.shape[2:]) == {1}:
        of_image = (1, 1) if _SHORTCUT in name else ()
        return tensor.reshaped(*tensor.shape[:2], *of_image)
    return tensor
