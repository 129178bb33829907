"""Seeded Gaussian noise, number for number that of torch's CPU generator.

A seed then names the same image here and in diffusers, and no torch is needed
at run time. What torch does was found by experiment on torch 2.13.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Final, SupportsIndex, final

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from .validation import whole

_MIN_SEED: Final = -(2**63)
MAX_SEED: Final = 2**64 - 1
_BLOCK: Final = 16
"""Number of values below which torch draws one by one in double precision."""


@final
class TorchCpuGenerator:
    """A stream of noise that continues from draw to draw, as ``torch.Generator``.

    One instance belongs to one request: every draw advances it, and it is not
    safe to share between threads. Two generators of one seed give the same draws.

    Maths, with ``u1``, ``u2`` uniform in [0, 1) from a 32-bit Mersenne Twister
    (Box-Muller in both cases):

    - 16 values or more: 24-bit uniforms in blocks of 16; value ``i`` of a block is
      ``sqrt(-2 ln(1 - u1)) cos(2 pi u2)`` and value ``i + 8`` the same with the
      sine, ``u1`` and ``u2`` being uniforms ``i`` and ``i + 8``. When the size is
      no multiple of 16, the last 16 values are drawn afresh.
    - fewer values: 53-bit uniforms in pairs, first the angle, then the radius, in
      double precision. A draw of an odd size keeps the spare value for the next
      small draw.

    References:
        Box and Muller, "A Note on the Generation of Random Normal Deviates", 1958.
        Differs from torch 2.13 with AVX2 or AVX-512 by at most 4.8e-7 in 5e7 values
        (two values apart in float32: torch approximates logarithm and sine). torch
        without AVX2 differs from both by up to 2.4e-6, because it rounds the angle
        elsewhere.
    """

    def __init__(self, seed: SupportsIndex) -> None:
        """Starts the stream.

        Args:
            seed: Whole number in [-2**63, 2**64 - 1], the range torch takes. As in
                torch, only its low 32 bits count: 5 and 2**32 + 5 are one stream.

        Raises:
            RequestError: The seed is no whole number, or outside that range.
        """
        # RandomState, not Generator: its seeding and its 32-bit stream are frozen
        # by numpy's compatibility policy.
        self._bits = np.random.RandomState(checked_seed(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """Draws standard normal values and advances the stream.

        Args:
            shape: Sizes, each 0 or more; ``()`` gives one value without a dimension.

        Returns:
            Array of ``shape``, float32, C order, owned by the caller.

        Raises:
            RequestError: A size is negative or no whole number.
        """
        sizes = _checked_shape(shape)
        count = math.prod(sizes)
        values = self._small(count) if count < _BLOCK else self._large(count)
        return values.reshape(sizes)

    def _large(self, count: int) -> npt.NDArray[np.float32]:
        whole = count - count % _BLOCK
        uniforms = self._uniforms_24(count)
        values = np.empty(count, np.float32)
        values[:whole] = _box_muller_blocks(uniforms[:whole])
        if whole != count:
            # All `count` uniforms are spent before torch draws the 16 of the tail,
            # which also replaces values of the last whole block.
            values[-_BLOCK:] = _box_muller_blocks(self._uniforms_24(_BLOCK))
        return values

    def _small(self, count: int) -> npt.NDArray[np.float32]:
        values: list[float] = []
        if count > 0 and self._spare is not None:
            values.append(self._spare)
            self._spare = None
        num_pairs = (count - len(values) + 1) // 2
        angle, radius = self._uniforms_53(2 * num_pairs).reshape(num_pairs, 2).T
        radius = np.sqrt(-2.0 * np.log1p(-radius))
        angle = 2.0 * np.pi * angle
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        values.extend(pairs.ravel().tolist())
        if len(values) > count:
            self._spare = values.pop()
        return np.array(values, np.float32)

    def _words(self, count: int) -> npt.NDArray[np.uint32]:
        # The full 32-bit range is the raw output of the generator, nothing rejected.
        return self._bits.randint(0, 2**32, count, dtype=np.uint32)

    def _uniforms_24(self, count: int) -> npt.NDArray[np.float32]:
        low_bits = self._words(count) & np.uint32(2**24 - 1)
        return low_bits.astype(np.float32) * np.float32(2.0**-24)

    def _uniforms_53(self, count: int) -> npt.NDArray[np.float64]:
        high, low = self._words(2 * count).reshape(count, 2).T.astype(np.uint64)
        word = (high << np.uint64(32)) | low
        return (word & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53


@final
class RequestNoise:
    """The noise of one request: one stream of all samples, or a stream of each.

    Args:
        seeds: One seed, whose stream all samples share, or one a sample.
        batch: Number of samples.
    """

    def __init__(self, seeds: Sequence[int], batch: int) -> None:
        assert len(seeds) in (1, batch)
        self._streams = [TorchCpuGenerator(seed) for seed in seeds]
        self._batch = batch

    def randn(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """Draws ``(B, *shape)`` and advances the streams, as diffusers does.

        Args:
            shape: Of each sample.
        """
        if len(self._streams) == 1:
            return self._streams[0].randn((self._batch, *shape))
        return np.concatenate([each.randn((1, *shape)) for each in self._streams])


def _box_muller_blocks(
    uniforms: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Turns uniforms, a multiple of 16 of them, into as many normal values."""
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    # Every intermediate is rounded to float32 where torch rounds it: an angle kept
    # in float64 would move the result by 1e-6. The functions themselves run in
    # float64, so that the noise does not depend on the machine's float32 sine.
    radius = np.sqrt(-2 * _float32(np.log(_float64(1 - blocks[:, 0]))))
    angle = _float64(np.float32(2 * np.pi) * blocks[:, 1])
    values = np.empty_like(blocks)
    values[:, 0] = radius * _float32(np.cos(angle))
    values[:, 1] = radius * _float32(np.sin(angle))
    return values.reshape(-1)


def _float32(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return values.astype(np.float32)


def _float64(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return values.astype(np.float64)


def checked_seed(seed: SupportsIndex) -> int:
    """Returns ``seed`` as an integer in torch's range, else raises RequestError."""
    value = whole("sampling: seed", seed)
    if not _MIN_SEED <= value <= MAX_SEED:
        # As in torch only 32 bits count, so a folded seed would lose nothing, but
        # the caller has to do it.
        raise RequestError(
            f"sampling: seed must be in [{_MIN_SEED}, {MAX_SEED}], got {value}; "
            f"{value % 2**32} names the same stream"
        )
    return value


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError as err:
        raise RequestError(
            f"sampling: a noise shape must be a sequence of whole numbers, "
            f"got {shape!r}; pass for example (1, 16, 64, 64)."
        ) from err
    if any(size < 0 for size in sizes):
        raise RequestError(
            f"sampling: sizes of a noise shape must be 0 or more, got {sizes}; "
            "check the picture's height and width."
        )
    return sizes
