"""Convolutions for CPUs, written in Mojo (``graphs/kernels``), as nodes of a graph.

What is before a convolution, a group norm, its activation and the doubling of sides, is
part of the operation. Of videos the norm is of all frames together, may be scaled by a
coarser video, and each frame is convolved with the two before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from max.dtype import DType
from max.graph import Dim, TensorType, TensorValue, ops

from .processor import ACTIVATIONS, Columns, bits_of, nothing_of, settings_of


@final
@dataclass(frozen=True)
class GroupNorm:
    """``norm(x) * gamma + beta``, of groups of channels over all pixels of a sample."""

    groups: int
    gamma: TensorValue
    """float32 ``(C,)``."""
    beta: TensorValue
    """float32 ``(C,)``."""
    epsilon: float = 1e-6


def convolution(
    x: TensorValue,
    matrix: TensorValue,
    channels: int,
    *,
    bias: TensorValue | None = None,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    norm: GroupNorm | None = None,
    silu: bool = False,
    upsample: bool = False,
    residual: TensorValue | None = None,
    dtype: DType | None = None,
) -> TensorValue:
    """Convolves ``silu(norm(x))``, perhaps of twice the size, and adds a residual.

    Args:
        x: Images ``(B, H, W, C)``.
        matrix: Packed filters, see :func:`packed_filter_shape`; their dtype is that of
            the products.
        channels: Of the result.
        bias: float32 ``(channels,)``.
        kernel: Height and width of a filter.
        stride: Pixels from one filter's place to the next, in both directions.
        padding: Rows of zeros at the top and the bottom, columns left and right.
        norm: Of ``x`` before.
        silu: Whether this activation follows the norm.
        upsample: Whether each pixel is then repeated, so that there are four of it.
        residual: Like the result.
        dtype: Of the result; that of ``x`` by default.

    Returns:
        ``(B, H', W', channels)``; ``H' = (H + top + bottom - kernel) // stride + 1``,
        of twice the ``H`` where it upsamples, and ``W'`` likewise.
    """
    device = x.device
    batch, height, width, _ = x.shape
    zoom = 2 if upsample else 1
    top, bottom, left, right = padding
    dtype = dtype or x.dtype
    assert residual is None or residual.dtype == dtype
    settings = [
        kernel,
        stride,
        top,
        bottom,
        left,
        right,
        0 if norm is None else norm.groups,
        bits_of(0.0 if norm is None else norm.epsilon),
        ACTIVATIONS.index("silu" if silu else ""),
        zoom,
    ]
    nothing = nothing_of(DType.float32, 1, device)
    inputs = [
        x,
        matrix,
        nothing if bias is None else bias,
        nothing if norm is None else norm.gamma,
        nothing if norm is None else norm.beta,
        nothing_of(dtype, 4, device) if residual is None else residual,
        settings_of(settings, device),
    ]
    shape = (
        batch,
        _places(height * zoom, top + bottom - kernel, stride),
        _places(width * zoom, left + right - kernel, stride),
        channels,
    )
    result = TensorType(dtype, shape, device)
    return ops.custom("diffusion_convolution", device, inputs, [result])[0].tensor


def _places(size: Dim, more: int, stride: int) -> Dim:
    """How often a filter goes into a size; a plain dimension where it is one."""
    if stride == 1:
        return size if more == -1 else size + (more + 1)
    return (size + more) // stride + 1


@final
@dataclass(frozen=True)
class Modulation:
    """``y * scale + shift`` by a video of as many frames, each perhaps coarser."""

    scale: Columns
    """float32 ``(F, h, w, C)``, among other columns."""
    shift: Columns
    """Of the same tensor."""


@final
@dataclass(frozen=True)
class FramesBefore:
    """Which frames a convolution over time sees."""

    frames: TensorValue
    """The two that were kept of the frames before, ``(2, H, W, C)``."""
    first: TensorValue
    """int64 ``(F,)``: for each frame the one two before it, as an index of these two
    and then the frames themselves."""
    last: TensorValue
    """int64 ``(2,)``: what the last two frames see one before them, and the last."""


def frame_convolution(
    x: TensorValue,
    before: FramesBefore,
    matrices: Sequence[TensorValue],
    channels: int,
    *,
    bias: TensorValue,
    norm: GroupNorm | None = None,
    modulation: Modulation | None = None,
    silu: bool = False,
    residual: TensorValue | None = None,
) -> tuple[TensorValue, TensorValue]:
    """Convolves ``silu(norm(x))`` of a video, and adds a residual.

    Zeros are around frames; sums are float32 until the last.

    Args:
        x: Frames ``(F, H, W, C)``, normed as one sample.
        before: What is before them, normed already.
        matrices: Packed filters ``3 x 3`` of each of three frames, the own one last.
        channels: Of the result.
        bias: float32 ``(channels,)``.
        norm: Of ``x`` before.
        modulation: Of what is normed.
        silu: Whether this activation follows.
        residual: Like the result.

    Returns:
        ``(F, H, W, channels)``, and the frames at ``before.last``, normed,
        ``(2, H, W, C)``.
    """
    device = x.device
    frames, height, width, _ = x.shape
    settings = [
        *(3, 1, 1, 1, 1, 1),
        0 if norm is None else norm.groups,
        bits_of(0.0 if norm is None else norm.epsilon),
        ACTIVATIONS.index("silu" if silu else ""),
        1,
        0 if modulation is None else modulation.scale.first,
        0 if modulation is None else modulation.shift.first,
    ]
    nothing = nothing_of(DType.float32, 1, device)
    coarser = nothing_of(DType.float32, 4, device)
    inputs = [
        x,
        before.frames,
        before.first,
        before.last,
        *matrices,
        bias,
        nothing if norm is None else norm.gamma,
        nothing if norm is None else norm.beta,
        coarser if modulation is None else modulation.scale.tensor,
        nothing_of(x.dtype, 4, device) if residual is None else residual,
        settings_of(settings, device),
    ]
    results = [
        TensorType(x.dtype, (frames, height, width, channels), device),
        TensorType(x.dtype, before.frames.shape, device),
    ]
    y, kept = ops.custom("diffusion_frame_convolution", device, inputs, results)
    return y.tensor, kept.tensor
