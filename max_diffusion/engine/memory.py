"""The memory plan: what a request will hold on the device, told before it is let in."""

from __future__ import annotations

import os
from typing import final

import numpy as np
from max.driver import Device

from ..errors import RequestError
from ..pipelines.text_to_image import TextToImagePipeline
from ..types import GenerationContext

# Latents, their prediction, and the next of both, in float32.
_LATENT_BUFFERS = 4
# Hidden states at once in a pass: a block's inputs, its outputs, and what lies between.
_STREAM_BUFFERS = 8


def default_memory_limit(device: Device) -> int:
    """Half of the memory that is free now, in bytes."""
    if device.is_host:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = int(device.stats["free_memory"])
    return free // 2


@final
class MemoryPlan:
    """A slot for each request, of the bytes of its buffers between graphs.

    Those are latents, text, cache state and hidden states. What a graph takes while it
    runs, the decoder's above all, is not known beforehand and comes on top.

    Belongs to the executor's thread, but for :meth:`needed_by`.

    Args:
        pipeline: Whose requests are planned.
        limit: Bytes that all slots together may take.
    """

    def __init__(self, pipeline: TextToImagePipeline, limit: int) -> None:
        self._pipeline = pipeline
        if pipeline.denoiser is not None:
            # Finds the shapes out, from graphs that are built once: not by a request.
            pipeline.denoiser.state_sizes((1, 1, 1), 1, pipeline.graph_groups)
        self.limit = limit
        self.reserved = 0
        """Bytes of all slots."""

    def needed_by(self, context: GenerationContext) -> int:
        """Bytes of a request's latents, text, cache state and share of a pass.

        Raises:
            RequestError: More than all slots together may take.
        """
        latents = context.latents
        needed = _LATENT_BUFFERS * latents.nbytes
        pipeline = self._pipeline
        if pipeline.denoiser is not None:
            branches = 1 if context.negative_tokens is None else 2
            shape = (*latents.shape[:2], context.tokens_2.shape[1])
            cache = context.cache.config
            sizes = pipeline.denoiser.state_sizes(shape, branches, cache.graph_groups)
            needed += cache.state_bytes(sizes)
            needed += _STREAM_BUFFERS * (sizes.image + sizes.text)
            needed += branches * sizes.text
        if needed > self.limit:
            pictures = latents.shape[0]
            raise RequestError(
                f"engine: this request of {pictures} pictures of {context.width} x "
                f"{context.height} needs {needed} bytes, more than the limit of "
                f"{self.limit}; ask for fewer or smaller ones, or another cache"
            )
        return int(np.int64(needed))

    def reserve(self, needed: int) -> bool:
        """Takes a slot, if there is room for it."""
        if self.reserved + needed > self.limit:
            return False
        self.reserved += needed
        return True

    def free(self, needed: int) -> None:
        """Gives a slot back."""
        self.reserved -= needed
