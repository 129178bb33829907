"""Decisions of the first-block cache, sample by sample: no device."""

from __future__ import annotations

import numpy as np
import pytest

from max_diffusion import FirstBlockConfig
from max_diffusion.caches import FirstBlockCache, ResidualState, Run


def decisions(config: FirstBlockConfig, changes: list[list[float]]) -> list[list[bool]]:
    """Step 0 computes without a history; then one list a step, one change a sample."""
    cache = FirstBlockCache(config)
    state: ResidualState = cache.create_state(Run())
    state.restart(len(changes[0]))
    decided = []
    for step, values in enumerate(changes, start=1):
        change = np.array(values, np.float32)
        decision = cache.decide(state, step, change)
        state.count(decision, change)
        decided.append([bool(flag) for flag in decision])
    return decided


def test_threshold_is_strict_and_per_sample() -> None:
    config = FirstBlockConfig(threshold=0.5)
    assert decisions(config, [[0.4, 0.5, 0.6]]) == [[False, True, True]]
    assert decisions(FirstBlockConfig(threshold=0.0), [[0.0, 1e-9]]) == [[True, True]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_computes(value: float) -> None:
    config = FirstBlockConfig(threshold=1e30)
    assert decisions(config, [[value, 0.1]] * 3) == [[True, False]] * 3


def test_warm_up_computes() -> None:
    config = FirstBlockConfig(threshold=1.0, warmup_steps=3)
    assert decisions(config, [[0.1]] * 4) == [[True], [True], [False], [False]]


def test_consecutive_steps_are_limited() -> None:
    config = FirstBlockConfig(threshold=1.0, max_consecutive_cached=2)
    got = decisions(config, [[0.1, 0.1], [0.1, 9.0], [0.1, 0.1], [0.1, 0.1]])
    assert got == [[False, False], [False, True], [True, False], [False, False]]


def test_all_steps_are_limited() -> None:
    config = FirstBlockConfig(threshold=1.0, max_cached_steps=2)
    got = decisions(config, [[0.1, 9.0]] * 3 + [[0.1, 0.1]] * 2)
    assert [row[0] for row in got] == [False, False, True, True, True]
    assert [row[1] for row in got] == [True, True, True, False, False]


def test_changes_add_up_and_start_again() -> None:
    config = FirstBlockConfig(threshold=1.0, max_accumulated_change=0.5)
    got = decisions(config, [[0.2, 0.3]] * 6)
    assert [row[0] for row in got] == [False, False, True, False, False, True]
    assert [row[1] for row in got] == [False, True, False, True, False, True]


def test_another_batch_counts_afresh() -> None:
    cache = FirstBlockCache(FirstBlockConfig(threshold=1.0, max_cached_steps=1))
    state = cache.create_state(Run())
    state.restart(2)
    small = np.full(2, 0.1, np.float32)
    state.count(cache.decide(state, 1, small), small)
    state.restart(3)
    assert not cache.decide(state, 2, np.full(3, 0.1, np.float32)).any()
