"""What is tried: every setting valid, every neighbour one rung away."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import cache

import pytest

from max_diffusion import CACHES, AbstractCacheConfig, RequestError, TaylorSeerConfig
from max_diffusion.evaluation.search_space import coarse, neighbours, tunable_caches

METHODS = sorted(set(CACHES) - {"none"})


@cache
def reachable(method: str) -> set[AbstractCacheConfig]:
    """All settings that some search could come to."""
    found: set[AbstractCacheConfig] = set(coarse(method))
    pending = deque(found)
    while pending:
        new = set(neighbours(pending.popleft())) - found
        found |= new
        pending.extend(new)
    return found


def rungs(a: AbstractCacheConfig, b: AbstractCacheConfig) -> list[int]:
    """How far two settings are apart, on each ladder where they are."""
    return [
        abs(ladder.index(vars(a)[knob]) - ladder.index(vars(b)[knob]))
        for knob, ladder in a.ladders.items()
        if vars(a)[knob] != vars(b)[knob]
    ]


def test_every_cache_has_ladders() -> None:
    assert sorted(tunable_caches()) == METHODS
    for method in METHODS:
        config = CACHES[method]()
        for knob, ladder in config.ladders.items():
            assert len(set(ladder)) == len(ladder) > 1
            # A value out of range would be an error here.
            for value in ladder:
                assert vars(replace(config, **{knob: value}))[knob] == value


@pytest.mark.parametrize("method", METHODS)
def test_first_settings_are_on_the_ladders_and_each_there_once(method: str) -> None:
    settings = coarse(method)
    assert len(set(settings)) == len(settings) > 1
    for config in settings:
        assert type(config) is CACHES[method]
        for knob, ladder in CACHES[method].ladders.items():
            assert vars(config)[knob] in ladder


@pytest.mark.parametrize("method", METHODS)
def test_every_neighbour_is_one_rung_away_and_none_a_repetition(method: str) -> None:
    for config in reachable(method):
        near = list(neighbours(config))
        assert config not in near
        assert len(set(near)) == len(near) > 0
        for other in near:
            assert rungs(config, other) == [1]
            assert config in neighbours(other)
            # Where one of them is the same as the other, it is not tried twice.
            options = vars(other)
            if "max_order" in options and options["max_order"] < 2:
                assert options["coefficients"] == "finite_difference"


@pytest.mark.parametrize("method", METHODS)
def test_every_value_of_every_ladder_can_be_reached(method: str) -> None:
    found = reachable(method)
    for knob, ladder in CACHES[method].ladders.items():
        assert {vars(config)[knob] for config in found} == set(ladder)


def test_neighbours_of_a_setting_in_the_middle() -> None:
    near = set(neighbours(TaylorSeerConfig(cache_interval=4, max_order=2)))
    base = TaylorSeerConfig(cache_interval=4, max_order=2)
    assert near == {
        replace(base, cache_interval=3),
        replace(base, cache_interval=5),
        replace(base, warmup_steps=12),
        replace(base, warmup_steps=6),
        replace(base, max_order=1),
        replace(base, max_order=0),
        replace(base, compute_last=1),
        replace(base, coefficients="newton"),
    }


@pytest.mark.parametrize("name", ["none", "tea", ""])
def test_methods_without_ladders_are_an_error(name: str) -> None:
    known = ", ".join(tunable_caches())
    message = f"tune: expected {known}, without options, got {name!r}; leave it out"
    with pytest.raises(RequestError, match=message):
        coarse(name)
