"""Files that name a cache: what is written is read, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from varied_caches import VARIED

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    AutoConfig,
    FirstBlockConfig,
    RequestError,
    TaylorSeerConfig,
    read_cache_file,
)
from max_diffusion.caches.cache_file import write_cache_file
from max_diffusion.checkpoint.reading import read_json
from max_diffusion.cli.evaluating import read_prompts
from max_diffusion.cli.generate import resolve
from max_diffusion.cli.main import parse
from max_diffusion.cli.options import chosen_cache
from max_diffusion.cli.serve import SERVE
from max_diffusion.cli.terminal import Interruption


@pytest.mark.parametrize("name", CACHES)
def test_every_option_of_every_cache_has_a_varied_value(name: str) -> None:
    assert type(VARIED[name]) is CACHES[name]
    defaults = vars(CACHES[name]())
    for item in fields(CACHES[name]):
        assert vars(VARIED[name])[item.name] != defaults[item.name], item.name


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "cache.json"
    for config in (CACHES[name](), VARIED[name]):
        write_cache_file(path, config)
        assert read_cache_file(path) == config
        assert read_cache_file(str(path)) == config
        data = json.loads(path.read_text())
        assert (data["cache"], set(data)) == (name, {"cache", "options"})
        assert set(data["options"]) == {item.name for item in fields(CACHES[name])}
    assert [file.name for file in tmp_path.iterdir()] == ["cache.json"]


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    write_cache_file(path, FirstBlockConfig(np.float32(0.25)))  # type: ignore[arg-type]
    assert read_cache_file(path) == FirstBlockConfig(0.25)


def test_what_tuning_says_is_for_people(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    write_cache_file(path, TaylorSeerConfig(), {"target": "40 dB", "is_met": True})
    assert json.loads(path.read_text())["tuning"] == {"target": "40 dB", "is_met": True}
    assert read_cache_file(path) == TaylorSeerConfig()


def test_options_that_are_left_out_have_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    path.write_text('{"cache": "taylorseer", "options": {"cache_interval": 4}}')
    assert read_cache_file(path) == TaylorSeerConfig(cache_interval=4)
    path.write_text('{"cache": "taylorseer"}')
    assert read_cache_file(path) == TaylorSeerConfig()


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, end: bytes) -> None:
    text = b'{"cache": "taylorseer",' + end + b'"options": {"cache_interval": 4}}' + end
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert read_cache_file(path) == TaylorSeerConfig(cache_interval=4)
    assert chosen_cache(None, (), str(path)) == TaylorSeerConfig(cache_interval=4)
    assert read_json(path)["options"] == {"cache_interval": 4}
    path.write_bytes(b"\xef\xbb\xbfa red circle\r\n\r\na star" + end)
    assert read_prompts([], str(path)) == ("a red circle", "a star")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"{'cache': 'none'}", "is no JSON"),
        (b'{"cache": "none"', "is no JSON"),
        (b'{"cache": "\xff"}', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", 'expected {"cache": NAME, "options": ...}'),
        (b"{}", 'expected {"cache": NAME, "options": ...}'),
        (b'{"cache": 1}', 'expected {"cache": NAME, "options": ...}'),
        (
            b'{"cache": "none", "b": 1, "a": 2}',
            "expected cache, options and tuning, got a, b",
        ),
        (b'{"cache": "none", "options": []}', "options must be an object, got []"),
        (b'{"cache": "none", "options": null}', "options must be an object, got None"),
        (b'{"cache": "tea"}', f"expected {', '.join(CACHES)}, got 'tea'"),
        (b'{"cache": "none", "options": {"x": 1}}', "no option 'x'; it has none"),
        (
            b'{"cache": "pab", "options": {"x": 1}}',
            "pab has no option 'x'; it has compute_steps, compute_last, interval",
        ),
        (
            b'{"cache": "pab", "options": {"interval": 2.5}}',
            "pab: interval must be a whole number, got 2.5",
        ),
        (
            b'{"cache": "pab", "options": {"interval": true}}',
            "pab: interval must be a whole number, got true",
        ),
        (
            b'{"cache": "magcache", "options": {"threshold": NaN}}',
            "threshold must be a number of 0 or more, got nan",
        ),
        (
            b'{"cache": "magcache", "options": {"ratios": ["1"]}}',
            "ratios must be a list of numbers, got",
        ),
        (
            b'{"cache": "step-mask", "options": {"compute_steps": [[0]]}}',
            "compute_steps must be a list of step indices or a policy, got [[0]]",
        ),
    ],
)
def test_anything_else_is_an_error_of_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "cache.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=re.escape(message)) as error:
        read_cache_file(path)
    assert str(error.value).startswith(f"cache file {path}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    message = r"none\.json cannot be read \(No such file.*; max-diffusion tune writes"
    with pytest.raises(RequestError, match=message):
        read_cache_file(tmp_path / "none.json")
    with pytest.raises(RequestError, match=r"cannot be read \(Is a directory\)"):
        read_cache_file(tmp_path)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no/cache\.json cannot be written"):
        write_cache_file(tmp_path / "no" / "cache.json", TaylorSeerConfig())


# --cache-file, instead of --cache and --cache-option.


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "cache.json"
    write_cache_file(path, VARIED["auto"])
    return str(path)


def test_a_file_is_the_cache_where_nothing_else_is_given(file: str) -> None:
    assert chosen_cache(None, [], file) == VARIED["auto"]
    assert chosen_cache(None, [], None) == CACHES["none"]()
    assert chosen_cache("auto", ["max_order=2"], None) == AutoConfig(max_order=2)


@pytest.mark.parametrize(
    ("name", "options", "given"),
    [
        ("none", [], "--cache"),
        ("auto", ["max_order=2"], "--cache"),
        (None, ["max_order=2"], "--cache-option"),
    ],
)
def test_a_file_and_a_cache_are_too_much(
    file: str, name: str | None, options: list[str], given: str
) -> None:
    message = f"--cache-file: it names the cache .* leave out {given}$"
    with pytest.raises(RequestError, match=message):
        chosen_cache(name, options, file)


def test_generate_takes_a_file(file: str, tmp_path: Path) -> None:
    def cache_of(*words: str) -> AbstractCacheConfig:
        args = ["generate", "a", "--output", str(tmp_path / "x.png"), *words]
        return resolve(parse(args)).cache

    assert cache_of("--cache-file", file) == VARIED["auto"]
    for more in (("--cache", "none"), ("--cache-option", "max_order=2")):
        with pytest.raises(RequestError, match=f"leave out {more[0]}"):
            cache_of("--cache-file", file, *more)
    with pytest.raises(RequestError, match="cannot be read"):
        cache_of("--cache-file", file + "x")


def test_serve_takes_a_file(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []

    def serve(model: Any, *args: object, **options: object) -> None:
        served.append(model.cache)

    monkeypatch.setattr("max_diffusion.serving.http.run.serve", serve)

    def run(*words: str) -> None:
        with Interruption() as interruption:
            SERVE.run(parse(["serve", *words]), interruption)

    run("--cache-file", file)
    run("--cache", "auto", "--cache-option", "max_order=2")
    run()
    assert served == [VARIED["auto"], AutoConfig(max_order=2), CACHES["none"]()]
    for more in (("--cache", "none"), ("--cache-option", "max_order=2")):
        with pytest.raises(RequestError, match=f"leave out {more[0]}"):
            run("--cache-file", file, *more)
    with pytest.raises(RequestError, match="cannot be read"):
        run("--cache-file", file + "x")
    assert len(served) == 3
