"""Buffers cut and joined by tokens."""

from __future__ import annotations

import numpy as np
import pytest
from max.driver import CPU
from max.dtype import DType

from max_diffusion.core.buffers import (
    first_tokens,
    from_numpy,
    join_tokens,
    to_numpy,
)


@pytest.mark.parametrize("dtype", [DType.float32, DType.bfloat16])
@pytest.mark.parametrize(("batch", "first", "second"), [(1, 5, 3), (3, 7, 11)])
def test_tokens_are_joined_and_cut(
    dtype: DType, batch: int, first: int, second: int
) -> None:
    rng = np.random.default_rng(1)
    parts = [
        from_numpy(rng.normal(size=(batch, n, 6)).astype(np.float32), dtype, CPU())
        for n in (first, second)
    ]
    joined = join_tokens(*parts)
    wanted = np.concatenate([to_numpy(part) for part in parts], axis=1)
    assert (joined.dtype, tuple(joined.shape)) == (dtype, wanted.shape)
    assert np.array_equal(to_numpy(joined), wanted)
    cut = first_tokens(joined, first)
    assert np.array_equal(to_numpy(cut), to_numpy(parts[0]))
