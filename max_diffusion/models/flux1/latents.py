"""FLUX.1's latents: their noise, how they are packed, and what coding them takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from max.driver import Device
from max.dtype import DType

from graphs.autoencoder_kl import AutoencoderKLConfig

from ...core.grid import Grid
from ...core.noise import TorchCpuGenerator
from ...core.request import GenerationRequest


def streams(request: GenerationRequest) -> list[tuple[TorchCpuGenerator, int]]:
    """The generators of a request, each with how many samples it draws."""
    if request.seeds is None:
        return [(TorchCpuGenerator(request.seed), request.num_images)]
    return [(TorchCpuGenerator(seed), 1) for seed in request.seeds]


def drawn(
    sources: Sequence[tuple[TorchCpuGenerator, int]],
    vae: AutoencoderKLConfig,
    grid: Grid,
) -> np.ndarray:
    """The next noise of each stream, one after the other: float32 ``(B, C, h, w)``."""
    size = vae.latent_channels, 2 * grid.rows, 2 * grid.columns
    return np.concatenate([stream.randn((count, *size)) for stream, count in sources])


def packed(latents: np.ndarray) -> np.ndarray:
    """Packs ``(B, C, h, w)`` as diffusers does, to ``(B, S_img, 4 C)``."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    tokens = cells.transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(tokens.reshape(batch, -1, 4 * channels))


def pixel_bytes(
    vae: AutoencoderKLConfig, entering: Sequence[int], device: Device, dtype: DType
) -> int:
    """Bytes a pixel that half of the autoencoder takes while it runs, counted once.

    At its widest, a residual block holds its input and two tensors of its output's
    channels on a CPU, in float32 at most; on a GPU three of its input's and one of its
    output's. For the demo model's decoder these and the image are 274 bytes a pixel on
    a CPU; 312 were measured at 1024 x 1024, with what MAX keeps from one run to the
    next, for which callers count half as much again.

    Args:
        vae: Its sizes.
        entering: Channels of the widest block's input at each level, pixels first.
        device: Where it runs.
        dtype: What it computes in.
    """
    of_input, of_output = (1, 2) if device.is_host else (3, 1)
    pairs = zip(entering, vae.block_out_channels, strict=True)
    channels = max(
        (of_input * before + of_output * after) / 4**level
        for level, (before, after) in enumerate(pairs)
    )
    size = 4 if device.is_host else dtype.size_in_bytes
    return math.ceil(channels * size) + 4 * 3 + 2 * 3
