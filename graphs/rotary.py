"""Rotary positions: tables of angles, made on the host.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
arXiv:2104.09864.
"""

from __future__ import annotations

import numpy as np


def rotary_table(
    ids: np.ndarray,
    axes_dims: tuple[int, ...],
    *,
    theta: float = 10000.0,
    dtype: type[np.floating] = np.float64,
) -> np.ndarray:
    """Computes cosines and sines of the rotary angles for token positions.

    Args:
        ids: Positions ``(S, number of axes)``: for FLUX.1 (0, row, column).
        axes_dims: Channels of one head given to each axis; all even.
        theta: Base of the frequencies ``theta ** (-2 i / dim)``.
        dtype: What angles are formed in, as a model's own pipeline does on CPU:
            float64 for FLUX.1, float32 for Qwen-Image.

    Returns:
        float32 ``(2, S, head_dim)``, cosines first, each angle for both channels of
        its pair.
    """
    angles = [
        ids[:, axis, None].astype(dtype) * _frequencies(dim, theta, dtype)
        for axis, dim in enumerate(axes_dims)
    ]
    joined = np.repeat(np.concatenate(angles, axis=1), 2, axis=1)
    return np.stack([np.cos(joined), np.sin(joined)]).astype(np.float32)


def _frequencies(dim: int, theta: float, dtype: type[np.floating]) -> np.ndarray:
    """Returns those of the pairs of one axis, ``(dim / 2,)``."""
    even = np.arange(0, dim, 2, dtype=dtype)
    if dtype is np.float64:
        return np.asarray(theta ** (-even / dim))
    return np.asarray(dtype(1) / dtype(theta) ** (even / dtype(dim)))


def image_ids(
    rows: int, columns: int, *, index: int = 0, is_centred: bool = False
) -> np.ndarray:
    """Returns packed latents' positions by row, float32 ``(rows * columns, 3)``.

    Args:
        rows: Image tokens from top to bottom.
        columns: Image tokens from left to right.
        index: First position of all, 0 of what is drawn; references have others.
        is_centred: Whether positions run from ``-(n - n // 2)`` to ``n // 2 - 1`` along
            each side, as in Qwen-Image; else from 0.
    """
    ids = np.zeros((rows, columns, 3), np.float32)
    ids[..., 0] = index
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None, :]
    if is_centred:
        ids[..., 1] -= rows - rows // 2
        ids[..., 2] -= columns - columns // 2
    return ids.reshape(-1, 3)
