"""Decoding within the memory there is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
from max.driver import Buffer

from ..core.buffers import take_rows
from ..core.request import GenerationContext
from .adapters import adapted

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline

LATENT_BUFFERS: Final = 4
"""Latents, their prediction, and the next of both, in float32."""
_GO_PIXELS: Final = 2**20


class DecodesInParts(ABC):
    """A pipeline whose videos are decoded some frames at a time."""

    @abstractmethod
    def decode_parts(
        self, context: GenerationContext, latents: Buffer
    ) -> Iterator[np.ndarray]:
        """Yields the frames of all samples from first to last, some at a time.

        The engine lets other requests take their steps between two parts.

        Args:
            context: Of the request.
            latents: ``(B, S_img, C)``.

        Yields:
            uint8 ``(B, f, H, W, 3)``, of which all ``f`` add up to the video's.
        """

    def decode(self, context: GenerationContext, latents: Buffer) -> np.ndarray:
        """Latents ``(B, S_img, C)`` to frames, uint8 ``(B, F, H, W, 3)``, at once."""
        return np.concatenate(list(self.decode_parts(context, latents)), axis=1)


def decode_in_goes(
    pipeline: TextToImagePipeline,
    context: GenerationContext,
    latents: Buffer,
    room: int | None = None,
) -> np.ndarray:
    """Decodes without a pause, see :func:`decode_gradually`."""
    decoding = decode_gradually(pipeline, context, latents, room)
    while True:
        try:
            next(decoding)
        except StopIteration as end:
            frames: np.ndarray = end.value
            return frames


def decode_gradually(
    pipeline: TextToImagePipeline,
    context: GenerationContext,
    latents: Buffer,
    room: int | None = None,
) -> Generator[None, None, np.ndarray]:
    """Decodes so many images at a time as there is room for, and videos in parts.

    Goes of more than a megapixel take memory and save no time, so that there are more
    of them than the room asks for. Every image is the same to the bit.

    Args:
        pipeline: What decodes.
        context: Of the request.
        latents: ``(B, S_img, C)``.
        room: Bytes for decoding; one image at a time is the least.

    Yields:
        Nothing, where something else may be done before it goes on.

    Returns:
        Frames, uint8 ``(B, F, H, W, 3)``.
    """
    denoiser = None if pipeline.denoiser is None else pipeline.denoiser.name
    if pipeline.adapters.components(context.loras) - {denoiser}:
        # Only then: the set may have left for another's since the last step.
        pipeline = adapted(pipeline, context.loras)
    batch, size = int(latents.shape[0]), (context.height, context.width)
    count = max(1, _GO_PIXELS // (context.num_frames * size[0] * size[1]))
    if room is not None:
        each = pipeline.decode_bytes(*size, context.num_frames)
        count = min(count, max(1, room // each))
    if count >= batch and not isinstance(pipeline, DecodesInParts):
        return pipeline.decode(context, latents)
    frames = np.empty((batch, context.num_frames, *size, 3), np.uint8)
    for start in range(0, batch, count):
        if start:
            yield
        rows = range(start, min(start + count, batch))
        own = latents if len(rows) == batch else take_rows(latents, rows)
        if not isinstance(pipeline, DecodesInParts):
            frames[start : rows.stop] = pipeline.decode(context, own)
            continue
        done = 0
        for part in pipeline.decode_parts(context, own):
            frames[start : rows.stop, done : done + part.shape[1]] = part
            done += part.shape[1]
            if done < context.num_frames:
                yield
    return frames
