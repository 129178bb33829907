"""Seeded noise against torch's CPU generator, the definition it has to meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import SupportsIndex, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from max_diffusion.core.noise import TorchCpuGenerator
from max_diffusion.errors import RequestError

SEEDS = [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1, -1, -(2**63)]
# 1e-6 is the promise; single draws stay below 5e-7, one float32 step at 4 to 8.
TOLERANCE = 1e-6


def seeded_noise(shape: Sequence[int], seed: SupportsIndex) -> npt.NDArray[np.float32]:
    return TorchCpuGenerator(seed).randn(shape)


def torch_noise(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).numpy()


def assert_same_noise(
    ours: npt.NDArray[np.float32],
    shape: tuple[int, ...],
    expected: npt.NDArray[np.float32],
) -> None:
    assert ours.shape == tuple(shape)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_seeded_noise_equals_torch_at_every_small_size(seed: int) -> None:
    for size in [*range(1, 71), 255, 256, 257]:
        shape = (size,)
        assert_same_noise(seeded_noise(shape, seed), shape, torch_noise(shape, seed))


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 0, 2), (1,), (3, 5), (1, 16, 16, 8), (2, 16, 7, 9), (1_000_003,)],
)
def test_seeded_noise_equals_torch_at_every_shape(shape: tuple[int, ...]) -> None:
    assert_same_noise(seeded_noise(shape, 42), shape, torch_noise(shape, 42))


@pytest.mark.parametrize("seed", [0, -1, 2**63])
def test_generator_continues_its_stream_as_torch_does(seed: int) -> None:
    # Odd small draws leave a spare value that large draws must not touch.
    sizes = [1, 40, 1, 7, 7, 17, 0, 3, 16, 15, 2, 33, 1, 1, 5000, 14]
    reference = torch.Generator("cpu").manual_seed(seed)
    generator = TorchCpuGenerator(seed)
    for size in sizes:
        expected = torch.randn((size,), generator=reference).numpy()
        assert_same_noise(generator.randn((size,)), (size,), expected)


def test_generator_keeps_no_state_between_instances() -> None:
    first = TorchCpuGenerator(7)
    first.randn((3,))
    np.testing.assert_array_equal(
        TorchCpuGenerator(7).randn((2, 9)), seeded_noise((2, 9), 7)
    )


def test_seeded_noise_counts_only_the_low_32_bits_of_the_seed() -> None:
    np.testing.assert_array_equal(
        seeded_noise((64,), 5), seeded_noise((64,), 2**32 + 5)
    )
    assert not np.array_equal(seeded_noise((64,), 5), seeded_noise((64,), 6))


def test_seeded_noise_takes_numpy_integers() -> None:
    np.testing.assert_array_equal(
        seeded_noise((20,), np.int64(-3)), seeded_noise((20,), -3)
    )
    assert seeded_noise(np.array([4, 5]).tolist(), 1).shape == (4, 5)


def test_seeded_noise_is_standard_normal() -> None:
    noise = seeded_noise((1_000_000,), 3)
    assert abs(float(noise.mean())) < 4 / math.sqrt(noise.size)
    assert abs(float(noise.std()) - 1) < 4 / math.sqrt(2 * noise.size)


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_seeded_noise_refuses_seeds_that_torch_refuses(seed: int) -> None:
    with pytest.raises(ValueError, match="Overflow"):
        torch.Generator("cpu").manual_seed(seed)
    with pytest.raises(
        RequestError,
        match=rf"seed must be in \[-9223372036854775808, .*\], got {seed}; \d+ n",
    ):
        seeded_noise((4,), seed)


@pytest.mark.parametrize("seed", [1.0, "1", None, True])
def test_seeded_noise_refuses_seeds_that_are_no_whole_numbers(
    seed: object,
) -> None:
    with pytest.raises(RequestError, match="seed must be a whole number, got"):
        seeded_noise((4,), cast("int", seed))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, -1), r"sizes of a noise shape must be 0 or more, got \(2, -1\)"),
        ((2.5,), r"must be a sequence of whole numbers, got \(2.5,\)"),
        (16, "must be a sequence of whole numbers, got 16"),
    ],
)
def test_seeded_noise_refuses_impossible_shapes(shape: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        seeded_noise(cast("tuple[int, ...]", shape), 0)
