"""Whether a request could ever fit the memory, and what would."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ..caches import AbstractCacheConfig, NoCacheConfig
from ..core.grid import Grid
from ..core.host_memory import host_memory
from ..errors import RequestError
from .decoding import LATENT_BUFFERS

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline


def check_room(
    pipeline: TextToImagePipeline,
    size: tuple[int, int, int, int],
    tokens: tuple[int, int, int],
    cache: AbstractCacheConfig,
    *,
    branches: int = 1,
    references: Sequence[Grid] = (),
) -> None:
    """Refuses a request that could never fit this machine's memory.

    Args:
        pipeline: What would run it.
        size: Samples, frames of each, height and width in pixels.
        tokens: ``(B, S_img, S_txt)``, of the tokens that are drawn.
        cache: What runs its steps.
        branches: 2 with true guidance.
        references: Tokens of each reference picture.

    Raises:
        RequestError: All its latents, images and cache state, and what decoding one
            image takes, or encoding a reference, are more than there is.
    """
    if not pipeline.device.is_host:
        return  # what its memory manager holds is not known
    batch, num_frames, height, width = size
    read = sum(grid.num_tokens for grid in references)
    each = 4 * (tokens[1] + read) * pipeline.token_channels
    held = batch * (LATENT_BUFFERS * each + 3 * num_frames * height * width)
    most = pipeline.decode_bytes(height, width, num_frames)
    if pipeline.pictures is not None:
        for grid in references:
            sides = grid.rows * pipeline.cell, grid.columns * pipeline.cell
            most = max(most, pipeline.pictures.encode_bytes(*sides))
    state = 0
    if pipeline.denoiser is not None and not isinstance(cache, NoCacheConfig):
        state = pipeline.caches.state_bytes(cache, tokens, branches, read)
    needed, there = held + most + state, host_memory()
    if needed <= there:
        return
    of_state = f", {state >> 20} of them for the state of {cache.name}" if state else ""
    fitting: Collection[str] = ()
    if state:
        room = there - held - most
        fitting = pipeline.caches.fitting(room, tokens, branches, read)
    raise RequestError(
        f"request: {in_words(*size)} {'needs' if batch == 1 else 'need'} at least "
        f"{needed >> 20} MiB{of_state}, and this process may have {there >> 20}; "
        f"{advice(num_frames, fitting)}"
    )


def in_words(count: int, num_frames: int, height: int, width: int) -> str:
    """Says what is drawn: ``2 videos of 49 frames of 720 x 480``, say."""
    kind = "picture" if num_frames == 1 else "video"
    frames = "" if num_frames == 1 else f" of {num_frames} frames"
    return f"{count} {kind}{'' if count == 1 else 's'}{frames} of {width} x {height}"


def advice(num_frames: int, fitting: Collection[str]) -> str:
    """Says what to ask for instead.

    Args:
        num_frames: Of what was asked for.
        fitting: Names of caches that it would fit with.
    """
    less = "fewer or smaller" if num_frames == 1 else "fewer, smaller or shorter"
    if not fitting:
        return f"ask for {less} ones"
    named = ", ".join(fitting)
    return f"ask for {less} ones, or for a cache that fits at its defaults: {named}"
