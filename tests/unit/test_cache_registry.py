"""Caches from outside of the package, known by their names."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

import max_diffusion.caches.registry as registry
from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    ChartStyle,
    RequestError,
    StepMaskConfig,
    register_cache,
)
from max_diffusion.caches import (
    Calibration,
    NoCache,
    Run,
    cache_from_options,
    cache_from_text,
    caches_from_text,
    label_of,
)
from max_diffusion.caches.config import _MARKERS
from max_diffusion.plugins import load_plugins


@pytest.fixture(autouse=True)
def registry_as_it_was() -> Iterator[None]:
    """What a test registers is gone after it."""
    before, modules = dict(registry._kinds), set(sys.modules)
    yield
    registry._kinds.clear()
    registry._kinds.update(before)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def widening(**options: Any) -> Any:
    """The example's configuration, registered by its import."""
    return importlib.import_module("new_cache").WideningConfig(**options)


def test_it_is_known_wherever_caches_are() -> None:
    assert "widening" not in CACHES
    config = widening(warmup_steps=2, growth=1.5)
    assert list(CACHES)[-1] == "widening"
    assert cache_from_options("widening", {"warmup_steps": 2, "growth": 1.5}) == config
    assert cache_from_text("widening", ["warmup_steps=2", "growth=1.5"]) == config
    assert label_of(config) == "widening:warmup_steps=2:growth=1.5"
    both = caches_from_text("widening:compute_last=1,taylorseer")
    assert both[0] == widening(compute_last=1)
    assert register_cache(type(config)) is type(config)  # again, as in a second import
    assert list(CACHES).count("widening") == 1


def test_the_examples_grid_widens() -> None:
    config = widening(warmup_steps=2, growth=2.0)
    assert [s for s in range(20) if config.computes(s)] == [0, 1, 2, 4, 8, 16]
    cache = config.create_cache(Calibration())
    state = cache.create_state(Run(20))
    assert np.array_equal(cache.decide(state, 3, 2), [True, True])  # no history yet


@dataclass(frozen=True)
class Plain(AbstractCacheConfig):
    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = "Computes everything."
    graph_groups: ClassVar[tuple[Any, ...]] = ("full",)

    interval: int = 2

    def state_bytes(self, sizes: object) -> int:
        return 0

    def create_cache(self, calibration: object) -> NoCache:
        return NoCache()


@dataclass(frozen=True, kw_only=True)
class Needy(Plain):
    needed: int


def changed(**attributes: Any) -> type[AbstractCacheConfig]:
    return dataclass(frozen=True)(type("Changed", (Plain,), attributes))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (int, "int: expected a subclass of AbstractCacheConfig"),
        (type("Bare", (Plain,), {}), "Bare: expected a frozen dataclass; decorate it"),
        (changed(name="Two Words"), "name must be lower-case words joined by hyphens"),
        (changed(summary=""), "summary must be one sentence, got ''"),
        (changed(name="auto"), "auto is max_diffusion.caches.auto.AutoConfig already"),
        (changed(ladders={"order": (1,)}), "order on a ladder is no option"),
        (changed(ladders={"interval": (3, 4)}), "must hold its default 2, got (3, 4)"),
        (
            changed(ladders={"interval": (2, 3)}, coarse={"interval": (2, 9)}),
            "coarse values of interval must be on its ladder, got (2, 9)",
        ),
        (
            changed(__annotations__={"table": "dict[str, int]"}, table=None),
            "option table must be int, float, str, bool or a tuple",
        ),
        (Needy, "Needy: every option needs a default"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_declarations_are_told(kind: Any, message: str) -> None:
    before = list(CACHES)
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        register_cache(kind)
    assert str(caught.value).startswith("register_cache: ")
    assert "\n" not in str(caught.value)
    assert list(CACHES) == before


def test_every_cache_of_the_package_declares_itself_rightly() -> None:
    for kind in list(CACHES.values()):
        assert register_cache(kind) is kind
    styles = [CACHES[name].style for name in CACHES if name != "none"]
    assert len({(s.colour, s.marker) for s in styles}) == len(styles)
    assert len({s.colour for s in styles}) == len(styles)


def test_repetitions_are_those_of_the_series() -> None:
    assert cache_from_text("taylorseer", ["coefficients=newton"]).is_repetition()
    config = cache_from_text("taylorseer", ["coefficients=newton", "max_order=2"])
    assert not config.is_repetition()
    assert not replace(StepMaskConfig(), max_order=1).is_repetition()


def test_a_plugin_is_loaded_once_and_registers(tmp_path: Any) -> None:
    path = tmp_path / "counting_plugin.py"
    path.write_text(
        "from new_cache import WideningConfig\n"
        "from max_diffusion import register_cache\n"
        "count = globals().get('count', 0) + 1\n"
        "register_cache(WideningConfig)\n"
    )
    load_plugins([str(path), str(path)])
    assert "widening" in CACHES
    import counting_plugin  # type: ignore[import-not-found]  # loaded from its path

    assert counting_plugin.count == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.py", "nothing.py cannot be loaded (FileNotFoundError: no file"),
        ("no.such.module", "cannot be loaded (ModuleNotFoundError"),
        ("json.py", "json.py cannot be loaded (FileNotFoundError"),
    ],
)
def test_plugins_that_are_not_there_are_told(name: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        load_plugins([name])


def test_a_plugin_that_fails_leaves_nothing(tmp_path: Any) -> None:
    path = tmp_path / "failing_plugin.py"
    path.write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(RequestError, match="ZeroDivisionError: division by zero"):
            load_plugins([str(path)])


def test_a_plugin_does_not_replace_another_module(tmp_path: Any) -> None:
    path = tmp_path / "json.py"
    path.write_text("")
    with pytest.raises(RequestError, match="has the name of a module that is loaded"):
        load_plugins([str(path)])


@pytest.mark.parametrize(
    ("colour", "marker", "message"),
    [
        ("red", "o", "colour must be six .* got 'red'"),
        ("#FF0000", "o", "colour must be six .* got '#FF0000'"),
        ("#ff00", "o", "colour must be six .* got '#ff00'"),
        ("#ff0000", "circle", "marker must be one of .* got 'circle'"),
        ("#ff0000", "", "marker must be one of .* got ''"),
    ],
)
def test_a_style_that_no_chart_could_draw_is_refused(
    colour: str, marker: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        ChartStyle(colour, marker)


def test_every_marker_that_is_allowed_can_be_drawn() -> None:
    from matplotlib.markers import MarkerStyle

    for marker in _MARKERS:
        assert MarkerStyle(marker).is_filled()
