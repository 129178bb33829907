"""What a benchmark runs; nothing is timed, and workers are stand-ins."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
from bench_workers import TELLING, WORKER, ours

from benchmarks.harness import (
    BenchResult,
    bench,
)
from benchmarks.harness import run as bench_run
from benchmarks.harness.__main__ import main
from benchmarks.harness.models import (
    DEMO,
    LARGE,
)
from benchmarks.harness.run import cache_of
from benchmarks.harness.runtimes import (
    OPENVINO,
    RUNTIMES,
    Environment,
    Runtime,
)
from max_diffusion import RequestError, TaylorSeerConfig
from max_diffusion.errors import RequestCancelled

ROOT = Path(__file__).parents[2]


def test_quick_installs_nothing_and_says_what_is_left_out(
    workers: Path, tmp_path: Path
) -> None:
    told: list[tuple[float, str]] = []
    result = bench(
        is_quick=True,
        work=tmp_path / "work",
        on_progress=lambda share, words: told.append((share, words)),
    )
    assert list((tmp_path / "work").iterdir()) == []
    not_run = dict(result.not_run["demo"])
    assert not_run.keys() == {
        r.label for r in RUNTIMES if r.environment and r.dtype == "float32"
    }
    assert all("without --quick" in text for text in not_run.values())
    assert result.sizes == (DEMO,)
    # Of ours, what the command line has compiled.
    drawn = {m.name for m in result.measures if m.group == "demo"}
    assert {"picture", "picture, taylorseer", "peak memory"} <= drawn
    assert "picture, first-block" not in drawn
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] <= 1


def test_figures_of_all_rounds_are_kept(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "RUNTIMES", (ours(caches=("taylorseer", "pab")),))
    monkeypatch.setattr(bench_run, "model_folder", lambda size, work: tmp_path)
    result = bench(rounds=2, work=tmp_path / "work")
    found = {(m.group, m.name): m.rounds for m in result.measures}
    label = "max_diffusion float32"
    assert found["demo", "step"] == {label: [2.0, 2.0]}
    assert found["demo", "step, taylorseer"] == {label: [0.5, 0.5]}
    assert found["flux-300m", "picture"] == {label: [100.0]}  # one round is enough
    assert found["cold", "start to first picture, cold"] == {label: [2.0]}
    # Its first picture is cut short.
    assert ("flux-300m", "start to first picture, warm") not in found
    assert found["parts", "TaylorSeer predict"]["MAX's own float32"] == [2.0, 2.0]
    assert ("demo", "step, pab") not in found
    shell = found["start", "shell to PNG, 50 steps"]
    assert shell.keys() == {label}
    assert len(shell[label]) == 2
    assert all(0 < seconds < 60 for seconds in shell[label])
    assert found["start", "of it: draw"] == {label: [0.02, 0.02]}
    assert found["start", "shell to PNG, 50 steps, empty cache"].keys() == {label}
    assert found["demo", "full steps, taylorseer"] == {label: [17, 17]}
    assert result.not_run == {
        "demo": {"max_diffusion float32, pab": "no such cache"},
        "flux-300m": {"max_diffusion float32, pab": "no such cache"},
        "parts": {"skipped steps": "it ended with 1: no memory"},
    }
    assert result.versions["cold"] == {label: {"thing": "1.0"}}
    assert result.command == "scripts/bench --rounds 2"
    json.dumps(result.to_dict(), allow_nan=False)


def test_ours_starts_with_what_the_command_line_loads(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workers / "draw_ours.py").write_text(
        WORKER.format(broken="nothing is").replace(
            '"ready_seconds": 1.0', '"ready_seconds": float(len(job["caches"]))'
        )
    )
    caches = ("taylorseer", "first-block", "magcache")
    for runtime, expected in ((ours(caches=caches), 2.0), (ours(), 1.0)):
        monkeypatch.setattr(bench_run, "RUNTIMES", (runtime,))
        result = bench(groups=("demo",), rounds=2, work=tmp_path / "work")
        [start] = [m for m in result.measures if m.name == "start to ready"]
        assert start.rounds == {"max_diffusion float32": [expected] * 2}


def test_processes_get_what_they_are_to_do(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workers / "draw_ours.py").write_text(
        WORKER.format(broken="nothing is").replace("case =", f"{TELLING}\ncase =")
    )
    other = replace(ours(caches=("taylorseer",)), name="other")
    runtimes = (ours(caches=("taylorseer", "auto")), other)
    monkeypatch.setattr(bench_run, "RUNTIMES", runtimes)
    monkeypatch.setenv("MODULAR_CACHE_DIR", "as it was")
    work = tmp_path / "work"
    bench(groups=("demo", "cold"), rounds=2, work=work)
    told = (workers / "told.jsonl").read_text().splitlines()
    jobs = [json.loads(line) for line in told]
    both, least = ["none", "taylorseer", "auto"], ["none", "taylorseer"]
    # What compiles; two rounds, in each another first; what compiles anew.
    first = [(both, 0), (least, 0), (least, 0)]
    mine, others = [(both, 3), (least, 0)], [(least, 3)]
    assert [(job["caches"], job["repeats"]) for job in jobs] == [
        *first,
        *mine,
        *others,
        *others,
        *mine,
        *[(least, 0)] * 2,
    ]
    for job in jobs:
        cached = len(job["caches"]) - 1 if job["repeats"] else 0
        assert len(job["cases"]) == 1 + cached
        assert (job["steps"], job["side"], job["dtype"]) == (50, 128, "float32")
    for job in jobs[:-2]:
        assert Path(job["compile_cache"]).parent == work / "compiled"
        assert job["variables"] == {
            "MODULAR_CACHE_DIR": "as it was",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled" / "inductor"),
        }
    stores = [
        Path(path)
        for job in jobs[-2:]
        for path in (*job["variables"].values(), job["compile_cache"])
    ]
    assert len({*stores}) == 6
    assert not any(store.exists() or work in store.parents for store in stores)


def test_quick_exports_nothing(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Environment, "python", lambda own, work, *, may_install: tmp_path / "python"
    )
    runtime = Runtime("OpenVINO", "draw_openvino.py", "float32", OPENVINO)
    monkeypatch.setattr(bench_run, "RUNTIMES", (runtime,))
    result = bench(is_quick=True, work=tmp_path / "work")
    assert result.not_run["demo"] == {
        "OpenVINO float32": "its model is not exported; run once without --quick"
    }


def test_a_runtime_that_fails_is_listed_with_its_last_words(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workers / "draw_ours.py").write_text(WORKER.format(broken="float32"))
    (workers / "taylorseer.py").write_text("print('no figures')")
    monkeypatch.setattr(bench_run, "RUNTIMES", (ours(),))
    result = bench(is_quick=True, work=tmp_path)
    assert result.groups == ("demo", "parts")
    assert result.not_run["demo"]["max_diffusion float32"] == (
        "it ended with 1: AssertionError: a defect"
    )
    words = result.not_run["parts"]["TaylorSeerCache, MAX's own float32"]
    assert "it printed no result: 'no figures" in words
    assert result.measures == ()


def test_what_progress_raises_ends_the_process_that_is_measured(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workers / "draw_ours.py").write_text(
        "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(30); "
        "open('ended', 'w')"
    )
    monkeypatch.setattr(bench_run, "RUNTIMES", (ours(),))
    monkeypatch.chdir(tmp_path)

    def stop(share: float, words: str) -> None:
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(is_quick=True, work=tmp_path, on_progress=stop)
    pid = (tmp_path / "pid").read_text()
    assert not Path(f"/proc/{pid}/cmdline").exists()
    assert not (tmp_path / "ended").exists()


def test_all_runtimes_have_the_same_caches() -> None:
    for size in (DEMO, LARGE):
        cache = cache_of("taylorseer", size)
        assert isinstance(cache, TaylorSeerConfig)
        assert cache.cache_interval == size.interval
        known = set(size.caches)
        assert all(set(r.caches) & known for r in RUNTIMES if r.caches)
    assert {r.dtype for r in RUNTIMES if r.is_ours} == {"float32", "bfloat16"}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RequestError, match="rounds must be at least 1, got 0"):
        bench(rounds=0)
    with pytest.raises(RequestError, match="the quick form has demo, parts, not flux"):
        bench(is_quick=True, groups=("flux-300m",))


def worker_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = ROOT / "benchmarks/harness/workers"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    return importlib.import_module("common")


def test_workers_tell_computed_steps_from_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = worker_module(monkeypatch)
    pictures = [
        common.Picture(1.0, [5.0, 1.0, 7.0], [True, True, False, True]),
        common.Picture(3.0, [6.0, 2.0, 9.0], [True, True, False, True]),
    ]
    assert common.summary(pictures) == {
        "picture_ms": 2000.0,
        "full_step_ms": 6.5,
        "cached_step_ms": 1.5,
        "full_steps": 3,
    }
    only = common.summary([common.Picture(1.0, [5.0], [True, True])])
    assert only["cached_step_ms"] is None
    assert common.summary([]) == {}
    assert 10 < common.peak_mib() < 10**6
    monkeypatch.delitem(sys.modules, "common")


# The command line.


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs it in an empty folder: exit code, standard output and errors."""
    monkeypatch.chdir(tmp_path)

    def run_command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return run_command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--readme", "R.md"], "--readme: the README takes the full form"),
        (["--rounds", "0"], "bench: rounds must be at least 1, got 0"),
        (["--rounds", "x"], "--rounds: invalid int value: 'x'"),
        (["--only", "demo, large"], "bench: a group must be demo, flux-300m, start, "),
        (["--quick", "--only", "cold"], "the quick form has demo, parts, not cold"),
        (["--readme", "no.md"], "bench: no.md cannot be read"),
        (["--output", "/dev/null"], "/dev/null"),
        (["--rou", "1"], "unrecognized arguments: --rou 1"),
        (["demo"], "unrecognized arguments: demo"),
    ],
)
def test_bad_arguments_are_one_line_and_2(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    code, output, errors = run(*arguments)
    assert message in errors
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_the_command_measures_and_writes(
    workers: Path,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(bench_run, "RUNTIMES", (ours(caches=("taylorseer",)),))
    words = ("--only", " demo,parts", "--rounds", "2", "--work", "w", "-o", "b")
    begin, end = (
        "<!-- benchmarks: written by scripts/bench -->",
        "<!-- end of benchmark",
    )
    (tmp_path / "R.md").write_text(f"{begin}\n{end}s -->\n")
    code, output, errors = run(*words, "--readme", "R.md", "--json")
    assert (code, errors) == (0, "")
    found = json.loads(output)
    assert found["files"][:2] == ["b/README.md", "b/results.json"]
    assert found["groups"] == ["demo", "parts"]
    assert found["command"] == "scripts/bench --only demo,parts --rounds 2"
    assert "| step, uncached, ms | 2 |" in (tmp_path / "R.md").read_text()
    code, output, errors = run("--quick", "--work", "w")
    assert (code, errors) == (0, "")
    assert output.endswith("benchmarks-quick/README.md\n")
    assert "step, uncached, ms" in output


def test_an_interruption_ends_with_130(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(**options: Any) -> BenchResult:
        raise RequestCancelled("stopped by Ctrl-C, nothing was written")

    monkeypatch.setattr("benchmarks.harness.__main__.bench", stopped)
    code, output, errors = run()
    assert (code, output) == (130, "")
    assert errors == "cancelled: stopped by Ctrl-C, nothing was written\n"


def test_the_script_runs_it() -> None:
    lines = (ROOT / "scripts" / "bench").read_text(encoding="utf-8")
    assert lines.count("-m benchmarks.harness") == 2
    done = processes.run(sys.executable, "-m", "benchmarks.harness", "--help", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("--quick", "--only", "--rounds", "--output", "--work", "--readme"):
        assert name in done.stdout
