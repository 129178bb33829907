"""A cache from outside of the package is compared and tuned as its own are."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from painters import STEPS, Painter
from PIL import Image

import max_diffusion.caches.registry as registry
from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    NoCacheConfig,
    RequestError,
    read_cache_file,
    register_cache,
)
from max_diffusion.caches import NoCache
from max_diffusion.cli.main import main
from max_diffusion.evaluation import Target, compare, save_comparison, save_tuning, tune
from max_diffusion.evaluation.search_space import coarse, neighbours, tunable_caches

PROMPTS: dict[str, Any] = {"prompts": ("a", "b"), "validation_prompts": ("u", "v")}


@pytest.fixture(autouse=True)
def registry_as_it_was() -> Iterator[None]:
    """What a test registers is gone after it."""
    before, modules = dict(registry._kinds), set(sys.modules)
    yield
    registry._kinds.clear()
    registry._kinds.update(before)
    for name in {"new_cache"} - modules:
        sys.modules.pop(name, None)


@pytest.fixture
def widening() -> Any:
    """The example's configuration, registered."""
    kind = importlib.import_module("new_cache").WideningConfig
    return register_cache(kind)  # where another test has imported it before


def behave(cache: AbstractCacheConfig, steps: int, prompt: str) -> tuple[float, float]:
    """A growing gap is quicker and less like; so are fewer steps, and lesser still."""
    if isinstance(cache, NoCacheConfig):
        return steps / 10, 60 * (1 - steps / STEPS)
    growth, warmup = vars(cache)["growth"], vars(cache)["warmup_steps"]
    seconds = STEPS / 10 / (4 * growth - 3) + 0.03 * warmup
    return seconds, 40 * (growth - 1) + 0.25 * (8 - warmup)


def painter(*names: str) -> Any:
    return Painter(behave, names=names)


def test_it_is_compared_without_being_named(widening: Any, tmp_path: Path) -> None:
    found = compare(painter("widening"), ["a", "b"], runs=1)
    baseline, row, *_ = found.rows
    assert (row.kind, row.label) == ("cache", "widening")
    assert row.setting.cache == widening()
    seconds = behave(widening(), STEPS, "a")[0]
    assert row.median_seconds == pytest.approx(seconds)
    assert row.speedup == pytest.approx(STEPS / 10 / seconds)
    assert row.control in {other.label for other in found.rows}
    assert set(found.refused) == set(CACHES) - {"none", "widening"}
    options = found.to_dict()["rows"][1]["options"]
    assert (options["growth"], options["warmup_steps"]) == (1.3, 4)
    files = save_comparison(found, tmp_path)
    assert tmp_path / "timeline-widening.png" in files
    page = files[0].read_text(encoding="utf-8")
    assert "<code>widening</code>" in page
    # Charts have the colour that it declares.
    assert has_colour(tmp_path / "quality.png", widening.style.colour)
    assert not has_colour(tmp_path / "quality.png", CACHES["taylorseer"].style.colour)
    assert baseline.kind == "baseline"


def has_colour(path: Path, colour: str) -> bool:
    with Image.open(path) as image:
        values = np.asarray(image.convert("RGB"))
    wanted = np.round(255 * np.array(to_rgb(colour))).astype(np.uint8)
    return bool((values == wanted).all(axis=2).sum() > 20)


def test_it_is_tuned_without_being_named(widening: Any, tmp_path: Path) -> None:
    assert "widening" in tunable_caches()
    result = tune(painter("widening"), Target(speedup=2.0), **PROMPTS)
    assert (result.is_met, result.is_finished) == (True, True)
    everything = [
        widening(growth=growth, warmup_steps=warmup, max_order=order)
        for growth in widening.ladders["growth"]
        for warmup in widening.ladders["warmup_steps"]
        for order in widening.ladders["max_order"]
    ]
    drawn = {cache: behave(cache, STEPS, "a") for cache in everything}
    wanted = min(error for seconds, error in drawn.values() if seconds <= STEPS / 20)
    assert drawn[result.winner.cache][1] == wanted
    tried = {trial.setting.cache for trial in result.trials}
    assert tried <= set(everything)
    assert set(coarse("widening")) == {widening(growth=1.1), widening(growth=1.3)}
    assert set(coarse("widening")) < tried  # and neighbours of these
    assert set(result.refused) == set(CACHES) - {"none", "widening"}
    cache_file, *_ = save_tuning(result, tmp_path)
    assert read_cache_file(cache_file) == result.winner.cache
    assert has_colour(tmp_path / "pareto.png", widening.style.colour)


def test_it_is_one_of_several_by_name_and_by_configuration(widening: Any) -> None:
    caches = ["widening", widening(growth=1.5), "auto"]
    both: Any = Painter(names=("auto", "widening"))
    found = compare(both, "a", caches, runs=1)
    labels = [row.label for row in found.of_kind("cache")]
    assert labels == ["widening", "widening:growth=1.5", "auto"]
    result = tune(
        painter("widening", "auto"),
        Target(speedup=1.5),
        methods=["widening"],
        **PROMPTS,
    )
    assert isinstance(result.winner.cache, widening)
    assert result.refused == {}


def test_the_command_line_knows_it(
    widening: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {}

    def open_model(*args: object, **options: Any) -> Any:
        given.update(options)
        model = painter("widening")
        model.compile = lambda: None
        return model

    monkeypatch.setattr("max_diffusion.pipelines.opening.open_model", open_model)
    words = ["compare", "a", "--caches", "widening:growth=1.5", "--runs", "1"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--json", "--steps", "20", "-o", str(tmp_path / "c")])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][1]["label"] == "widening:growth=1.5"
    assert given["caches"] == ("none", widening(growth=1.5))
    words = ["tune", "a", "--target-speedup", "1.5", "--caches", "widening", "--json"]
    with pytest.raises(SystemExit) as end:
        main([*words, "-o", str(tmp_path / "t")])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["winner"]["cache"] == "widening"


@dataclass(frozen=True)
class Paired(AbstractCacheConfig):
    """Two options that do not go together everywhere."""

    name: ClassVar[str] = "paired"
    summary: ClassVar[str] = "Has options that depend on each other."
    graph_groups: ClassVar[tuple[Any, ...]] = ("full",)
    ladders: ClassVar[Any] = MappingProxyType({"low": (1, 2, 3), "high": (1, 2, 3)})
    coarse: ClassVar[Any] = MappingProxyType({"low": (1, 3), "high": (2, 3)})

    low: int = 1
    high: int = 3

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise RequestError(f"paired: low must be at most high, got {self}")

    def state_bytes(self, sizes: object) -> int:
        return 0

    def create_cache(self, calibration: object) -> NoCache:
        return NoCache()


def test_options_that_do_not_go_together_are_not_tried() -> None:
    register_cache(Paired)
    assert coarse("paired") == [Paired(1, 2), Paired(1, 3), Paired(3, 3)]
    assert set(neighbours(Paired(2, 2))) == {Paired(1, 2), Paired(2, 3)}

    def paint(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        if isinstance(cache, Paired):
            return 1.5 - 0.3 * cache.low, 0.5 * cache.low + 0.1 * cache.high
        return steps / 10, float(STEPS - steps)

    pipeline: Any = Painter(paint, names=("paired",))
    result = tune(pipeline, Target(speedup=2.0), **PROMPTS)
    assert result.winner.cache == Paired(2, 2)
    assert len(result.trials) == 6  # all that go together


def test_a_cache_that_refuses_all_it_starts_from_says_why() -> None:
    @dataclass(frozen=True)
    class Impossible(Paired):
        name: ClassVar[str] = "impossible"
        coarse: ClassVar[Any] = MappingProxyType({"low": (3,), "high": (1, 2)})

    register_cache(Impossible)
    with pytest.raises(RequestError, match="low must be at most high"):
        coarse("impossible")
    pipeline: Any = Painter(names=("impossible",))
    with pytest.raises(RequestError, match="low must be at most high"):
        tune(pipeline, Target(speedup=2.0), methods=["impossible"], **PROMPTS)


def test_a_cache_without_ladders_is_compared_and_not_tuned() -> None:
    @dataclass(frozen=True)
    class Fixed(Paired):
        name: ClassVar[str] = "fixed"
        ladders: ClassVar[Any] = MappingProxyType({})
        coarse: ClassVar[Any] = MappingProxyType({})

    register_cache(Fixed)
    assert "fixed" not in tunable_caches()
    pipeline: Any = Painter(names=("fixed",))
    found = compare(pipeline, "a", runs=1)
    assert [row.label for row in found.of_kind("cache")] == ["fixed"]
    with pytest.raises(RequestError, match=r"expected taylorseer, .*, got 'fixed'"):
        tune(pipeline, Target(speedup=2.0), methods=["fixed"], **PROMPTS)
    assert replace(Fixed(), low=2) == Fixed(2, 3)
