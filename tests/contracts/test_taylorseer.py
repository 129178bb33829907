"""TaylorSeerCache by its documented contract, against float64 and known tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef

from max_diffusion import (
    CacheStateError,
    DenoisingCacheConfig,
    RequestError,
    TaylorSeerCache,
    TaylorSeerConfig,
)
from max_diffusion.caches import History, add_series_graphs
from max_diffusion.caches.series import series_weights
from max_diffusion.execution.compiler import CompiledGraphs
from max_diffusion.execution.graph_call import run
from max_diffusion.execution.graph_module import GraphModule

ORDERS = (1, 2, 4)


@pytest.fixture(scope="module")
def caches() -> dict[int, TaylorSeerCache]:
    session = InferenceSession(devices=[CPU()])
    return {
        order: TaylorSeerCache(
            DenoisingCacheConfig(
                taylorseer=True,
                taylorseer_max_order=order,
                taylorseer_cache_interval=5,
                taylorseer_warmup_steps=9,
            ),
            DType.float32,
            CPU(),
            session,
        )
        for order in ORDERS
    }


@pytest.fixture(scope="module")
def models() -> Mapping[str, Model]:
    build = partial(add_series_graphs, dtype=DType.float32, device=DeviceRef.CPU())
    session = InferenceSession(devices=[CPU()])
    graphs = CompiledGraphs(session, CPU())
    graphs.add([GraphModule("series", build)], dict)
    return graphs.models


def field(step: int, rng_seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(rng_seed)
    scale = rng.standard_normal((2, 5, 3)).astype(np.float32)
    return (scale * step * step).astype(np.float32)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (1, {4: 14, 6: 33, 7: 41, 8: 49, 9: 57, 11: 115}),
        (2, {4: 15, 6: 33.75, 7: 44, 8: 55.75, 9: 69, 11: 115.7}),
    ],
)
def test_forecasts_equal_the_published_table(
    caches: dict[int, TaylorSeerCache], order: int, expected: dict[int, float]
) -> None:
    """y = step squared, computed at 0, 1, 2, 3, 5 and 10."""
    cache = caches[order]
    state = cache.create_state(1, 1, 1)
    got = {}
    for step in range(12):
        if step in (0, 1, 2, 3, 5, 10):
            value = np.full((1, 1, 1), step * step, np.float32)
            cache.update(state, Buffer.from_numpy(value), step)
        else:
            got[step] = float(cache.predict(state, step).to_numpy().item())
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_forecasts_equal_float64(
    caches: dict[int, TaylorSeerCache], order: int
) -> None:
    cache, rng = caches[order], np.random.default_rng(order)
    state, last = cache.create_state(2, 7, 3), 0
    factors: list[np.ndarray] = []
    for step in (0, 1, 4, 6, 11):
        new = rng.standard_normal((2, 7, 3))
        ladder = [new]
        for old in factors[:order]:
            ladder.append((ladder[-1] - old) / (step - last))
        factors, last = ladder, step
        cache.update(state, Buffer.from_numpy(new.astype(np.float32)), step)
        offset = 2
        wanted = sum(f * offset**j / math.factorial(j) for j, f in enumerate(factors))
        got = cache.predict(state, step + offset).to_numpy()
        assert np.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_one_computed_step_is_reused_not_doubled(
    caches: dict[int, TaylorSeerCache],
) -> None:
    cache = caches[1]
    state = cache.create_state(2, 5, 3)
    cache.update(state, Buffer.from_numpy(field(3)), 0)
    assert np.array_equal(cache.predict(state, 1).to_numpy(), field(3))


def test_order_one_holds_two_factors(caches: dict[int, TaylorSeerCache]) -> None:
    state = caches[1].create_state(2, 5, 3)
    assert state.num_bytes == 0
    for step in range(4):
        caches[1].update(state, Buffer.from_numpy(field(step)), step)
    assert state.num_bytes == 2 * field(0).nbytes


def test_an_update_keeps_a_copy(caches: dict[int, TaylorSeerCache]) -> None:
    state, value = caches[1].create_state(2, 5, 3), Buffer.from_numpy(field(3))
    caches[1].update(state, value, 0)
    value.inplace_copy_from(Buffer.from_numpy(field(9)))
    assert np.array_equal(caches[1].predict(state, 1).to_numpy(), field(3))


def test_a_new_shape_starts_again(caches: dict[int, TaylorSeerCache]) -> None:
    cache = caches[1]
    state = cache.create_state(2, 5, 3)
    cache.update(state, Buffer.from_numpy(field(1)), 0)
    other = np.ones((1, 4, 3), np.float32)
    cache.update(state, Buffer.from_numpy(other), 1)
    assert np.array_equal(cache.predict(state, 2).to_numpy(), other)


@pytest.mark.parametrize("coefficients", ["finite_difference", "newton"])
@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_samples_advance_alone(
    models: Mapping[str, Model], order: int, coefficients: str
) -> None:
    """After any history, each sample's forecast is that of its own values."""
    rng = np.random.default_rng(order)
    history = History(order, coefficients)
    own: list[list[tuple[int, np.ndarray]]] = [[], [], []]
    for step in range(16):
        rows = [row for row in range(3) if step == 0 or rng.random() < 0.5]
        value = rng.standard_normal((len(rows), 5, 3)).astype(np.float32)
        if rows:
            every = len(rows) == 3
            history.push(Buffer.from_numpy(value), step, None if every else rows)
        for place, row in enumerate(rows):
            own[row] = [*own[row], (step, value[place])][-order - 1 :]
        got = run(models, history.forecast(step + 2)).to_numpy()
        for row, values in enumerate(own):
            weights = series_weights([s for s, _ in values], step + 2, coefficients)
            wanted = sum(w * v for w, (_, v) in zip(weights, values, strict=True))
            scale = np.abs(weights).sum() * 4
            assert np.abs(got[row] - wanted).max() <= 1e-6 * scale
        distinct = {id(slot) for slot in history._slots}
        assert history.num_bytes == len(distinct) * 3 * 5 * 3 * 4
        assert list(history.last_steps) == [values[-1][0] for values in own]
        assert list(history.orders) == [len(values) - 1 for values in own]
    assert history.num_bytes == (order + 1) * 3 * 5 * 3 * 4


def test_relative_error_equals_float64(models: Mapping[str, Model]) -> None:
    rng = np.random.default_rng(7)
    history = History(1, "newton")
    values = rng.standard_normal((3, 4, 9, 5)).astype(np.float32)
    for step in (0, 1):
        history.push(Buffer.from_numpy(values[step]), step)
    forecast = 3 * values[1].astype(np.float64) - 2 * values[0]
    wanted = np.abs(forecast - values[2]).mean((1, 2)) / np.abs(values[2]).mean((1, 2))
    got = run(models, history.relative_error(Buffer.from_numpy(values[2]), 3))
    assert np.allclose(got, wanted, rtol=1e-5)
    some = Buffer.from_numpy(values[2][[1, 3]])
    assert np.allclose(
        run(models, history.relative_error(some, 3, [1, 3])), wanted[[1, 3]], rtol=1e-5
    )
    zero = Buffer.from_numpy(np.zeros((4, 9, 5), np.float32))
    assert not np.isfinite(run(models, history.relative_error(zero, 3))).any()


def test_misuse_is_said(caches: dict[int, TaylorSeerCache]) -> None:
    cache = caches[1]
    state = cache.create_state(2, 5, 3)
    with pytest.raises(CacheStateError, match="step 4 cannot be predicted before"):
        cache.predict(state, 4)
    cache.update(state, Buffer.from_numpy(field(1)), 3)
    with pytest.raises(CacheStateError, match="step 3 was computed after step 3"):
        cache.update(state, Buffer.from_numpy(field(1)), 3)


@pytest.mark.parametrize(
    ("warmup", "interval", "phase", "computed"),
    [
        (3, 5, "documented", [0, 1, 2, *range(4, 50, 5)]),
        (4, 5, "documented", [0, 1, 2, 3, *range(5, 50, 5)]),
        (9, 5, "documented", [*range(9), *range(10, 50, 5)]),
        (3, 2, "documented", [0, 1, 2, *range(4, 50, 2)]),
        (4, 2, "documented", [0, 1, 2, *range(3, 50, 2)]),
        (4, 2, "official", [0, 1, 2, *range(3, 50, 2)]),
        (4, 2, "absolute", [0, 1, 2, 3, *range(4, 50, 2)]),
        (3, 5, "absolute", [0, 1, 2, *range(5, 50, 5)]),
        (4, 5, "absolute", [0, 1, 2, 3, *range(5, 50, 5)]),
        (9, 5, "absolute", [*range(9), *range(10, 50, 5)]),
        (3, 2, "absolute", [0, 1, 2, *range(4, 50, 2)]),
        (3, 5, "official", [0, 1, 2, *range(7, 50, 5)]),
        (4, 5, "official", [0, 1, 2, 3, *range(8, 50, 5)]),
        (9, 5, "official", [*range(9), *range(13, 50, 5)]),
        (3, 2, "official", [0, 1, 2, *range(4, 50, 2)]),
        (3, 6, "official", [0, 1, 2, *range(8, 50, 6)]),
    ],
)
def test_schedule_equals_the_published_tables(
    warmup: int, interval: int, phase: str, computed: list[int]
) -> None:
    config = TaylorSeerConfig(cache_interval=interval, warmup_steps=warmup, phase=phase)
    assert [step for step in range(50) if not config.should_skip(step)] == computed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_interval": 0}, "cache_interval must be at least 1, got 0"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, got 0"),
        ({"max_order": 5}, "max_order must be at most 4, got 5"),
        ({"phase": "x"}, "phase must be documented, official, absolute, got 'x'"),
        ({"coefficients": "x"}, "must be finite_difference, newton, got 'x'"),
        ({"compute_steps": "x"}, "one of slow, medium, fast, ultra, got 'x'"),
        ({"compute_steps": (-1,)}, "must be at least 0, got -1"),
        ({"compute_last": -1}, "compute_last must be at least 0, got -1"),
    ],
)
def test_bad_settings_are_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TaylorSeerConfig(**settings)


def test_both_methods_at_once_are_refused() -> None:
    settings = DenoisingCacheConfig(taylorseer=True, first_block_caching=True)
    with pytest.raises(RequestError, match="both on; enable one"):
        settings.resolve()
