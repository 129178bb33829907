"""The decorator where the error of its forecasts decides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from decorated import computed_steps, replaying
from max.driver import Buffer

from max_diffusion.decorator import CacheInfo, taylor_seer


def wave(num_steps: int, speed: float = 0.05) -> np.ndarray:
    """A smooth path, ``(num_steps, 64)``."""
    phase = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.sin(np.arange(num_steps)[:, None] * speed + phase) + 3


def run_auto(values: np.ndarray, **settings: Any) -> tuple[CacheInfo, float]:
    """Counts, and the largest relative error."""
    output, call = replaying(values, mode="auto", **settings)
    errors = [abs(call() - value).mean() / abs(value).mean() for value in values]
    return output.cache_info(), max(errors)


@pytest.mark.parametrize("order", range(4))
def test_auto_saves_passes_and_stays_near_the_tolerance(order: int) -> None:
    values = wave(200, speed=0.05 if order else 0.005)
    before = math.inf
    skipped = []
    for tolerance in (3e-2, 1e-2, 3e-3):
        info, error = run_auto(
            values, n_derivatives=order, tolerance=tolerance, max_interval=50
        )
        assert tolerance / 5 < error < tolerance
        assert error < before
        before = error
        skipped.append(info.skipped)
        assert sum(info) == 200
    assert skipped == sorted(skipped, reverse=True)
    assert skipped[0] >= 66


def test_auto_keeps_warmup_and_max_interval() -> None:
    settings: dict[str, Any] = {"warmup_steps": 5, "mode": "auto", "n_derivatives": 0}
    cached = taylor_seer(max_interval=6, **settings)(np.ones)
    # A constant is forecast exactly, so each gap is twice the last, up to the cap.
    assert computed_steps(cached, 32, 2) == [0, 1, 2, 3, 4, 6, 10, 16, 22, 28]


def test_auto_ignores_the_interval() -> None:
    cached = taylor_seer(mode="auto", skip_interval_steps=1)(np.ones)
    assert computed_steps(cached, 8, 2) == [0, 1, 3, 7]


def test_auto_computes_noise() -> None:
    noise = np.random.default_rng(3).standard_normal((100, 200))
    info, _ = run_auto(noise, n_derivatives=2)
    assert info == (100, 0)


def test_auto_computes_where_the_error_is_no_number() -> None:
    zeros = taylor_seer(mode="auto")(np.zeros)
    assert computed_steps(zeros, 20, 2) == list(range(20))
    values = np.ones((30, 4))
    values[10:20, 1] = math.nan
    _, call = replaying(values, mode="auto", n_derivatives=1, max_interval=3)
    outputs = np.array([call() for _ in values])
    output, call = replaying(values, mode="auto", n_derivatives=1, max_interval=3)
    computed = []
    for step in range(30):
        before = output.cache_info().computed
        call()
        computed += [step] * (output.cache_info().computed - before)
    # Steps 11 and 12 may be forecast, since 9 or 10 was the last that was seen.
    assert set(range(13, 22)) <= set(computed)
    assert {*range(10)} - {*computed}
    assert np.isfinite(outputs[24:]).all()


def test_auto_measures_in_torch_and_buffers_as_in_numpy() -> None:
    values = wave(60).astype(np.float32)
    expected, _ = run_auto(values, tolerance=1e-2)
    assert expected.skipped > 0
    makers: list[Any] = [torch.from_numpy, Buffer.from_numpy]
    for make in makers:
        outputs = [make(np.array(value)) for value in values]
        output, call = replaying(outputs, mode="auto", tolerance=1e-2)
        for _ in values:
            call()
        assert output.cache_info() == expected
