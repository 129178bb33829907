"""Where CogVideoX's video tokens are: rotary tables, or what is added to the tokens."""

from __future__ import annotations

import numpy as np

from .cogvideox import CogVideoXConfig

_THETA = 10000.0


def rotary_table(
    config: CogVideoXConfig, frames: int, rows: int, columns: int
) -> np.ndarray:
    """Computes cosines and sines of the rotary angles of video tokens.

    A quarter of a head's channels is for the frame, three eighths each for row and
    column. With ``patch_size_t`` positions are indices; without, rows and columns are
    fitted into the middle of the grid that the model was trained on. Angles are formed
    in float32, as diffusers does.

    Args:
        config: Sizes of the transformer.
        frames: Frames of the grid of tokens.
        rows: Rows of it.
        columns: Columns of it.

    Returns:
        float32 ``(2, S_img, head_dim)``, cosines first, each angle for both channels of
        its pair.
    """
    size = config.attention_head_dim
    dims = size // 4, size // 8 * 3, size // 8 * 3
    places = (
        np.arange(frames, dtype=np.float32),
        *_row_and_column_places(config, rows, columns),
    )
    angles = [
        position[:, None] * _frequencies(dim)
        for position, dim in zip(places, dims, strict=True)
    ]
    joined = np.repeat(_on_grid(angles), 2, axis=1)
    return np.stack([np.cos(joined), np.sin(joined)])


def position_table(
    config: CogVideoXConfig, frames: int, rows: int, columns: int
) -> np.ndarray:
    """Computes what is added to video tokens, float32 ``(S_img, D)``.

    Sines and cosines of frame (a quarter of the channels), column and row (three
    eighths each), in float64.

    Args:
        config: Sizes of the transformer.
        frames: Frames of the grid of tokens.
        rows: Rows of it.
        columns: Columns of it.
    """
    width = config.width
    counts = frames, columns, rows
    dims = width // 4, 3 * width // 8, 3 * width // 8
    scales = (
        config.temporal_interpolation_scale,
        config.spatial_interpolation_scale,
        config.spatial_interpolation_scale,
    )
    parts = []
    for count, dim, scale in zip(counts, dims, scales, strict=True):
        position = np.arange(count, dtype=np.float32) / np.float32(scale)
        rates = _THETA ** (-np.arange(dim // 2) / (dim / 2))
        angles = position.astype(np.float64)[:, None] * rates
        parts.append(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    of_frame, of_column, of_row = parts
    shape = frames, rows, columns
    spread = (
        np.broadcast_to(of_frame[:, None, None], (*shape, dims[0])),
        np.broadcast_to(of_column[None, None, :], (*shape, dims[1])),
        np.broadcast_to(of_row[None, :, None], (*shape, dims[2])),
    )
    joined = np.concatenate(spread, axis=3).reshape(-1, width)
    return joined.astype(np.float32)


def _row_and_column_places(
    config: CogVideoXConfig, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 positions of rows and columns."""
    if config.patch_size_t is not None:
        return np.arange(rows, dtype=np.float32), np.arange(columns, dtype=np.float32)
    height = config.sample_height // config.patch_size
    width = config.sample_width // config.patch_size
    # As large as fits in the trained grid, in its middle; halves go to even numbers.
    if rows / columns > height / width:
        fitted = height, round(height / rows * columns)
    else:
        fitted = round(width / columns * rows), width
    found = []
    for count, size, whole in zip(
        (rows, columns), fitted, (height, width), strict=True
    ):
        first = round((whole - size) / 2)
        last = (first + size) * (count - 1) / count
        found.append(np.linspace(first, last, count).astype(np.float32))
    return found[0], found[1]


def _frequencies(dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1 / np.float32(_THETA) ** exponents).astype(np.float32)


def _on_grid(parts: list[np.ndarray]) -> np.ndarray:
    """Tables of frames, rows and columns side by side for every token."""
    of_frame, of_row, of_column = parts
    shape = len(of_frame), len(of_row), len(of_column)
    spread = (
        np.broadcast_to(of_frame[:, None, None], (*shape, of_frame.shape[1])),
        np.broadcast_to(of_row[None, :, None], (*shape, of_row.shape[1])),
        np.broadcast_to(of_column[None, None, :], (*shape, of_column.shape[1])),
    )
    return np.concatenate(spread, axis=3).reshape(-1, sum(p.shape[1] for p in parts))
