"""One step's inputs, the same for all runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphs.rotary import image_ids, rotary_table
from max_diffusion.core.buffers import bfloat16_bits

from .sizes import GpuSize


def write_step_inputs(path: Path, size: GpuSize, config: Mapping[str, Any]) -> None:
    """Writes arrays by name; all are exact in bfloat16, so that none has others.

    Args:
        path: File to write.
        size: How many tokens there are.
        config: The transformer's.
    """
    rng = np.random.default_rng(0)
    cells = size.side // size.cell
    axes = tuple(config["axes_dims_rope"])
    places = image_ids(cells, cells)
    # diffusers multiplies by 1000 in its own dtype: these two stay exact there.
    arrays = {
        "latents": _rounded(rng, 1, cells * cells, config["in_channels"]),
        "timestep": np.full(1, 500, np.float32),
        "guidance": np.full(1, 4, np.float32),
        "text": _rounded(rng, 1, size.text_tokens, config["joint_attention_dim"]),
        "pooled_text": _rounded(rng, 1, config["pooled_projection_dim"]),
        "text_rotary": rotary_table(np.zeros((size.text_tokens, 3)), axes),
        "image_rotary": rotary_table(places, axes),
        "image_ids": places,
    }
    np.savez(path, allow_pickle=False, **arrays)


def _rounded(rng: np.random.Generator, *shape: int) -> np.ndarray:
    bits = bfloat16_bits(rng.standard_normal(shape, np.float32))
    return (bits.astype(np.uint32) << 16).view(np.float32)
