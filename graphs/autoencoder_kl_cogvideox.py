"""AutoencoderKLCogVideoX: from latents to the frames of a video, a chunk at a time.

Yang et al., "CogVideoX: Text-to-Video Diffusion Models with An Expert Transformer",
2024, arXiv:2408.06072; weight names are those of diffusers' class; of filters over
time, on CPUs, each frame is a tensor.

A convolution sees a frame and the two before it, and a norm all frames of a chunk, so
that chunks are part of the model: the first one of two or three latent frames, the
others of two. What convolutions need of the chunk before are tensors between calls. One
graph decodes all chunks of a video: how frames repeat in time, and what is before the
first one, comes in as indices. Frames are the batch of NHWC tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, final

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

from . import convolutions
from .latents import to_uint8
from .layers import conv2d, fused_group_norm, group_moments
from .pieces import Layer, project
from .weights import WeightScope

CAUSAL: Final = 2
"""Frames before its own that a convolution sees."""


@final
@dataclass(frozen=True)
class CogVideoXDecoderConfig:
    """Sizes of a decoder, named as in its ``config.json``."""

    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    temporal_compression_ratio: int = 4
    scaling_factor: float = 1.15258426

    @property
    def num_doublings(self) -> int:
        """How often the number of frames is doubled, after the first levels."""
        return int(math.log2(self.temporal_compression_ratio))

    @property
    def convolutions(self) -> Sequence[tuple[int, int]]:
        """Level and input channels of every convolution over time, in order."""
        widths = self.block_out_channels[::-1]
        channels = widths[0]
        found = [(0, self.latent_channels), *[(0, channels)] * 4]
        for level, width in enumerate(widths):
            for _ in range(self.layers_per_block + 1):
                found += [(level, channels), (level, width)]
                channels = width
        return (*found, (len(widths) - 1, channels))


def chunk_lengths(frames: int) -> Sequence[int]:
    """Returns the latent frames of every chunk of a video of so many."""
    first = min(frames, 2 + frames % 2)
    return (first, *[2] * ((frames - first) // 2))


@final
@dataclass(frozen=True)
class ChunkIndices:
    """How the frames of one chunk follow from its latent frames; all int64."""

    read: Sequence[tuple[np.ndarray, np.ndarray]]
    """At first and after each doubling, of the last two frames of the chunk before and
    then the frames themselves: those that convolutions see two before each frame, and
    the last two of all that they see. Before the first frame of a video is that frame
    again."""
    doubled: Sequence[np.ndarray]
    """Of each doubling, which frame before it each frame is made of."""
    seen: Sequence[np.ndarray]
    """After each doubling, which latent frame the norms of each frame read."""

    @classmethod
    def of(
        cls, config: CogVideoXDecoderConfig, frames: int, *, is_first: bool
    ) -> ChunkIndices:
        """Returns the indices of a chunk of so many latent frames."""

        def read(count: int) -> tuple[np.ndarray, np.ndarray]:
            front = [CAUSAL, CAUSAL] if is_first else [0, 1]
            rows = np.array([*front, *range(CAUSAL, CAUSAL + count)])
            return rows[:count], rows[count:]

        seen = np.arange(frames)
        all_read, all_doubled, all_seen = [read(frames)], [], []
        for _ in range(config.num_doublings):
            # The first of an odd number of frames stands alone; it stays the only one.
            counts = np.full(seen.size, 2)
            counts[0] -= seen.size % 2
            doubled = np.repeat(np.arange(seen.size), counts)
            seen = seen[doubled]
            all_read.append(read(seen.size))
            all_doubled.append(doubled)
            all_seen.append(seen)
        return cls(tuple(all_read), tuple(all_doubled), tuple(all_seen))

    @property
    def arrays(self) -> Sequence[np.ndarray]:
        """Returns all of them, as :func:`chunk_types` has them."""
        flat = [each for group in self.read for each in group]
        return (*flat, *self.doubled, *self.seen)


def chunk_types(
    config: CogVideoXDecoderConfig, dtype: DType, device: DeviceRef
) -> list[TensorType]:
    """Returns the input types of :func:`decode_chunk`, in order.

    Latents of a chunk, unscaled, float32 ``(frames_0, height_0, width_0, C)``; int8
    carriers of the sizes of all levels, see ``autoencoder_kl``; the arrays of
    :class:`ChunkIndices`; then of every convolution the last two frames that it saw of
    the chunk before, ``(2, height, width, channels)``.
    """
    levels = range(len(config.block_out_channels))
    sizes = [(f"height_{i}", f"width_{i}") for i in levels]
    shape = ("frames_0", *sizes[0], config.latent_channels)
    counts = [f"frames_{i}" for i in range(config.num_doublings + 1)]
    indices = [size for count in counts for size in (count, CAUSAL)]
    indices += [*counts[1:], *counts[1:]]
    return [
        TensorType(DType.float32, shape, device),
        *(TensorType(DType.int8, size, device) for size in sizes),
        *(TensorType(DType.int64, (size,), device) for size in indices),
        *(
            TensorType(dtype, (CAUSAL, *sizes[level], channels), device)
            for level, channels in config.convolutions
        ),
    ]


def decode_chunk(
    config: CogVideoXDecoderConfig, w: WeightScope, inputs: Sequence[TensorValue]
) -> list[TensorValue]:
    """Decodes one chunk of a video.

    Args:
        config: Sizes of the decoder.
        w: Its weights.
        inputs: Of :func:`chunk_types`.

    Returns:
        Frames, uint8 ``(F, H, W, 3)``, and of every convolution its last two frames.
    """
    decoder = _ChunkDecoder(config, w, inputs)
    frames = decoder.decode()
    return [to_uint8(frames), *decoder.kept]


@final
class _ChunkDecoder:
    """The nodes of one chunk's graph; keeps what convolutions hand on."""

    def __init__(
        self,
        config: CogVideoXDecoderConfig,
        w: WeightScope,
        inputs: Sequence[TensorValue],
    ) -> None:
        self.config, self.w = config, w
        levels, doublings = len(config.block_out_channels), config.num_doublings
        rest = iter(inputs)
        latents = next(rest)
        if w.dtype != latents.dtype:
            latents = w.call("cast", [latents], partial(ops.cast, dtype=w.dtype))
        self.carriers = [next(rest) for _ in range(levels)]
        self.read = [[next(rest) for _ in range(2)] for _ in range(doublings + 1)]
        self.doubled = [next(rest) for _ in range(doublings)]
        # The latents that norms read, a frame for each of theirs.
        self.latents = [
            latents,
            *(self._repeated(latents, next(rest)) for _ in range(doublings)),
        ]
        self.before = rest
        self.kept: list[TensorValue] = []

    def decode(self) -> TensorValue:
        """Returns frames ``(F, H, W, 3)``, about -1..1."""
        w, config = self.w / "decoder", self.config
        widths = config.block_out_channels[::-1]
        x = self._convolution(w / "conv_in", self.latents[0], widths[0], 0)
        for index in range(2):
            x = self._resnet(w / "mid_block" / "resnets" / index, x, widths[0], 0)
        for level, width in enumerate(widths):
            block = w / "up_blocks" / level
            for index in range(config.layers_per_block + 1):
                x = self._resnet(block / "resnets" / index, x, width, level)
            if level < len(widths) - 1:
                x = self._upsampled(block / "upsamplers" / 0 / "conv", x, level)
        last = len(widths) - 1
        return self._convolution(
            w / "conv_out", x, config.out_channels, last, norm=w / "norm_out"
        )

    def _resnet(
        self, w: WeightScope, x: TensorValue, width: int, level: int
    ) -> TensorValue:
        y = self._convolution(w / "conv1", x, width, level, norm=w / "norm1")
        channels = int(x.shape[3])
        if channels != width:
            frames, rows, columns, _ = x.shape
            x = conv2d(w / "conv_shortcut", x, channels, width, kernel=1)
            x = ops.rebind(x, (frames, rows, columns, width))
        return self._convolution(
            w / "conv2", y, width, level, norm=w / "norm2", residual=x
        )

    def _upsampled(self, w: WeightScope, x: TensorValue, level: int) -> TensorValue:
        """Doubles the sides, and at the first levels the number of frames.

        What convolves single frames does so before they are repeated.
        """
        channels, (height, width) = int(x.shape[3]), self.carriers[level + 1].shape
        y = conv2d(w, x, channels, channels, doubled_to=(height, width))
        y = ops.rebind(y, (x.shape[0], height, width, channels))
        if level < self.config.num_doublings:
            y = self._repeated(y, self.doubled[level])
        return y

    def _repeated(self, x: TensorValue, index: TensorValue) -> TensorValue:
        """Takes frames by index, each any number of times; see ``WeightScope.call``."""
        return self.w.call("repeat", [x, index], partial(ops.gather, axis=0))

    def _convolution(
        self,
        w: WeightScope,
        x: TensorValue,
        width: int,
        level: int,
        *,
        norm: WeightScope | None = None,
        residual: TensorValue | None = None,
    ) -> TensorValue:
        """Convolves each frame and the two before it, normed; keeps the last two."""
        before, channels = next(self.before), int(x.shape[3])
        first, last = self.read[min(level, self.config.num_doublings)]
        if w.products is None:
            if norm is not None:
                x = self._norm(norm, x, level)
            # Functions, as norms: each place of its own would be compiled of its own.
            seen = self.w.call("read", [before, x, first], _frames)
            self.kept.append(self.w.call("read", [before, x, last], _frames))
            return _plain_convolution(w / "conv", seen, self.kept[-1], width, residual)
        w = w / "conv"
        fused = None if norm is None else self._fused_norm(norm, channels)
        y, kept = convolutions.frame_convolution(
            x,
            convolutions.FramesBefore(before, first, last),
            [
                w.packed_filter(f"weight.{index}", width, channels, 3)
                for index in range(CAUSAL + 1)
            ],
            width,
            bias=w.joined(["bias"], width),
            norm=fused,
            modulation=None
            if norm is None
            else self._modulation(norm, channels, level),
            silu=norm is not None,
            residual=residual,
        )
        self.kept.append(kept)
        return y

    def _fused_norm(self, w: WeightScope, channels: int) -> convolutions.GroupNorm:
        """Group norm over a chunk, before it is scaled and shifted."""
        config = self.config
        return fused_group_norm(
            w / "norm_layer", channels, config.norm_num_groups, config.norm_eps
        )

    def _modulation(
        self, w: WeightScope, channels: int, level: int
    ) -> convolutions.Modulation:
        """What a norm is scaled and shifted by, computed from the chunk's latents."""
        names = "conv_y.conv", "conv_b.conv"
        layers = [Layer(name, channels) for name in names]
        latents = self.latents[min(level, self.config.num_doublings)]
        inputs = self.config.latent_channels
        scale, shift = project(w, layers, latents, inputs, dtype=DType.float32)
        return convolutions.Modulation(scale, shift)

    def _norm(self, w: WeightScope, x: TensorValue, level: int) -> TensorValue:
        """Group norm over a chunk, scaled and shifted by its latents, then SiLU."""
        channels = int(x.shape[3])
        given = self._modulation(w, channels, level)
        scale, shift = given.scale, given.shift
        affine = [w.joined([f"norm_layer.{part}"], channels) for part in _AFFINE]
        zoom, config = 2**level, self.config

        def normed(
            x: TensorValue,
            of_scale: TensorValue,
            of_shift: TensorValue,
            weight: TensorValue,
            bias: TensorValue,
        ) -> TensorValue:
            frames, height, width, _ = of_scale.shape
            whole = frames, height * zoom, width * zoom, channels
            flat = ops.reshape(
                ops.rebind(x, whole),
                (1, frames * height * zoom, width * zoom, channels),
            )
            groups, epsilon = config.norm_num_groups, config.norm_eps
            centred, deviation = group_moments(flat, groups, epsilon)
            y = centred * (deviation * weight) + bias
            y = ops.reshape(y, (frames, height, zoom, width, zoom, channels))
            spread = frames, height, 1, width, 1, channels
            given = (
                ops.reshape(tensor[:, :, :, each.first : each.first + channels], spread)
                for tensor, each in ((of_scale, scale), (of_shift, shift))
            )
            y = y * next(given) + next(given)
            y = ops.reshape(ops.silu(y), whole)
            return ops.rebind(y, x.shape).cast(x.dtype)

        values = [x, scale.tensor, shift.tensor, *affine]
        return self.w.call(f"norm_{channels}_{level}", values, normed)


_AFFINE: Final = ("weight", "bias")


def _frames(before: TensorValue, x: TensorValue, index: TensorValue) -> TensorValue:
    """Takes frames of the two before a chunk and its own."""
    # Not of both joined: MAX 26.7 takes no sums of dimensions within a function.
    zero, limit = (ops.constant(n, DType.int64, x.device) for n in (0, CAUSAL))
    own = ops.gather(x, ops.max(index - limit, zero), axis=0)
    last = ops.constant(CAUSAL - 1, DType.int64, x.device)
    older = ops.gather(before, ops.min(index, last), axis=0)
    is_own = ops.reshape(index >= limit, (index.shape[0], 1, 1, 1))
    return ops.where(ops.broadcast_to(is_own, own.shape), own, older)


def _plain_convolution(
    w: WeightScope,
    first: TensorValue,
    last: TensorValue,
    width: int,
    residual: TensorValue | None,
) -> TensorValue:
    """By MAX's operation, see ``layers``: one function for all of the same sizes.

    ``first`` is two frames before each one, and ``last`` the two that follow those.
    """
    channels = int(first.shape[3])
    filters = w("weight", width, channels, 3, 3, 3)
    filters = ops.permute(filters, [2, 3, 4, 1, 0])
    # What is added goes in, too: a sum outside would be no function's result.
    added = [] if residual is None else [residual]
    inputs = [first, last, filters, w("bias", width), *added]

    def convolved(
        first: TensorValue,
        last: TensorValue,
        filters: TensorValue,
        bias: TensorValue,
        *added: TensorValue,
    ) -> TensorValue:
        video = ops.unsqueeze(ops.concat([first, last], axis=0), 0)
        y = ops.conv3d(video, filters, padding=(0, 0, 1, 1, 1, 1))
        y = ops.rebind(ops.squeeze(y, 0) + bias, (*first.shape[:3], width))
        return sum(added, start=y)

    return w.call(f"conv3d_{channels}_{width}", inputs, convolved)
