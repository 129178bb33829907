"""The benchmark's plan and tables; nothing is timed, and workers are stand-ins."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
from PIL import Image

from benchmarks.harness import (
    BenchResult,
    Measure,
    bench,
    check_targets,
    save_bench,
    update_readme,
)
from benchmarks.harness import run as bench_run
from benchmarks.harness.__main__ import main
from benchmarks.harness.artefact_cache import digest, made_once
from benchmarks.harness.models import (
    DEMO,
    LARGE,
    model_digest,
    model_folder,
)
from benchmarks.harness.report import summary
from benchmarks.harness.run import cache_of
from benchmarks.harness.runtimes import (
    OPENVINO,
    RUNTIMES,
    TORCH,
    Environment,
    PeerError,
    Runtime,
    exported,
)
from max_diffusion import RequestError
from max_diffusion.checkpoint import find_model
from max_diffusion.errors import RequestCancelled

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys
job = json.loads(sys.argv[1])
assert "{broken}" not in json.dumps(job), "a defect"
case = {{"picture_ms": 100.0, "full_step_ms": 2.0, "cached_step_ms": 0.5,
         "full_steps": 17}}
print("noise that a runtime prints")
print(json.dumps({{
    "versions": {{"thing": "1.0"}},
    "ready_seconds": 1.0,
    "first_picture_seconds": 2.0,
    "peak_mib": 300.0,
    "cases": {{
        name: {{"error": "no such cache"}} if name == "pab" else case
        for name in job["cases"]
    }},
}}))
"""
# Tells a file beside it what it was asked to do.
TELLING = """
import os, pathlib
told = pathlib.Path(__file__).with_name("told.jsonl")
kept = {name: os.environ.get(name) for name in (
    "MODULAR_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
with told.open("a") as file:
    print(json.dumps({**job, "variables": kept}), file=file)
"""
PARTS = 'print(\'{"update": 1.0, "predict": 2.0}\')'


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for what is measured, and no pauses."""
    folder = tmp_path / "workers"
    folder.mkdir()
    for name in {runtime.worker for runtime in RUNTIMES}:
        (folder / name).write_text(WORKER.format(broken="nothing is"))
    (folder / "taylorseer.py").write_text(PARTS)
    (folder / "skipped.py").write_text("import sys; sys.exit('no memory')")
    monkeypatch.setattr(bench_run, "_WORKERS", folder)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return folder


def ours(**options: Any) -> Runtime:
    return Runtime("max_diffusion", "draw_ours.py", "float32", **options)


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
    assert {measure.group for measure in result.measures} == {"parts"}


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


def test_an_environment_that_cannot_be_made_is_a_peer_not_run(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="its environment is not made"):
        TORCH.python(tmp_path, may_install=False)
    assert list(tmp_path.iterdir()) == []
    bad = Environment("bad", ("./no such folder",))
    with pytest.raises(PeerError, match=r"pip failed: ERROR: .*no such folder"):
        bad.python(tmp_path, may_install=True)
    with pytest.raises(PeerError, match="its environment is not made"):
        bad.python(tmp_path, may_install=False)


def test_an_environment_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []
    module = "benchmarks.harness.runtimes._run"
    monkeypatch.setattr(module, lambda line, what: lines.append(line))
    own = Environment("own", ("thing==1",))
    python = tmp_path / "environments" / "own" / "bin" / "python"
    for _ in range(2):
        assert own.python(tmp_path, may_install=True) == python
    assert sum("thing==1" in line for line in lines) == 1
    assert own.python(tmp_path, may_install=False) == python
    other = replace(own, requirements=("thing==2",))
    with pytest.raises(PeerError):
        other.python(tmp_path, may_install=False)
    other.python(tmp_path, may_install=True)
    assert sum("thing==2" in line for line in lines) == 1


def test_what_is_kept_is_made_again_of_something_else(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        made.append(folder)
        (folder / "x").touch()

    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise PeerError("no space")

    kept = tmp_path / "a" / "b"
    with pytest.raises(FileNotFoundError):
        made_once(kept, "first", None)
    with pytest.raises(PeerError):
        made_once(kept, "first", fails)
    for of in ("first", "first", "second", "second"):
        assert made_once(kept, of, make) == kept
    assert made == [kept, kept]
    assert made_once(kept, "second", None) == kept
    with pytest.raises(FileNotFoundError):
        made_once(kept, "first", None)


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found = []
    for name, content in (("x", "1"), ("x", "2"), ("y", "2")):
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / name).write_text(content)
        found += [digest([tmp_path, "k"]), digest([tmp_path]), digest(["k", tmp_path])]
    assert len({*found}) == len(found)
    assert digest([tmp_path, "k"]) == found[-3]
    assert digest(["ab", "c"]) != digest(["a", "bc"])


def test_a_model_is_exported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []
    module = "benchmarks.harness.runtimes._run"
    monkeypatch.setattr(module, lambda line, what: lines.append(line))
    target = tmp_path / "target"
    python = tmp_path / "bin" / "python"

    def export(of: str, *, may_export: bool) -> Path:
        return exported(tmp_path, of, target, python, may_export=may_export)

    with pytest.raises(PeerError, match="not exported; run once without --quick"):
        export("a model", may_export=False)
    for of in ("a model", "a model", "it retrained"):
        assert export(of, may_export=True) == target
    assert export("it retrained", may_export=False) == target
    assert len(lines) == 2
    assert lines[0][0] == str(tmp_path / "bin" / "optimum-cli")
    assert lines[0][-1] == str(target)


def test_the_large_model_is_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged = model_digest(LARGE)
    assert unchanged != model_digest(DEMO)
    small = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
    }
    module = "benchmarks.harness.models._LARGE_TRANSFORMER"
    monkeypatch.setattr(module, small)
    folder = model_folder(LARGE, tmp_path)
    assert model_digest(LARGE) != unchanged
    assert find_model(folder).class_name == "FluxPipeline"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert model_folder(LARGE, tmp_path) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    # diffusers reads the same folder, with every weight in its place.
    from diffusers import FluxTransformer2DModel

    model, loading = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.config.num_attention_heads == 2


def test_all_runtimes_have_the_same_caches() -> None:
    for size in (DEMO, LARGE):
        assert cache_of("taylorseer", size).cache_interval == size.interval
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


def test_a_target_that_could_not_be_written_is_told_first(tmp_path: Path) -> None:
    check_targets(tmp_path / "new", None)
    assert not (tmp_path / "new").exists()
    with pytest.raises(RequestError, match="cannot be read"):
        check_targets(tmp_path, tmp_path / "no.md")
    (tmp_path / "results.json").write_text('{"runs": [{}]}')
    with pytest.raises(RequestError, match="holds no results"):
        check_targets(tmp_path, None)


RESULT = BenchResult(
    is_quick=False,
    date="2026-01-02",
    rounds=3,
    groups=("demo", "parts"),
    sizes=(DEMO,),
    measures=(
        Measure(
            "demo",
            "step",
            "ms",
            {
                "OpenVINO float32": [4.0, 5.0, 90.0],
                "max_diffusion float32": [6.0, 5.5, 7.0],
                "torch.compile float32": [5.5],
                "diffusers eager float32": [9.0],
                "max_diffusion bfloat16": [3.0],
                "torch.compile bfloat16": [30.0],
            },
        ),
        Measure("demo", "picture", "ms", {"max_diffusion float32": [300.4]}),
        Measure(  # which of the two is ahead cannot be told
            "demo",
            "peak memory",
            "MiB",
            {"max_diffusion float32": [400.5], "OpenVINO float32": [399.9]},
        ),
        Measure("parts", "predict", "ms", {"max_diffusion float32": [0.0123]}),
    ),
    not_run={"demo": {"torch.compile float32": "no compiler"}, "parts": {"x": "gone"}},
    versions={"demo": {"OpenVINO float32": {"openvino": "2026.4.1"}}},
    command="scripts/bench --only demo,parts",
    machine={
        "processor": "P",
        "cores": 2,
        "memory_gib": 23.5,
        "system": "Linux",
        "python": "3.11",
    },
    seconds=120.0,
)


def test_tables_have_medians_and_say_who_is_ahead(tmp_path: Path) -> None:
    files = save_bench(RESULT, tmp_path / "b")
    page = files[0].read_text()
    assert "|  | max_diffusion | OpenVINO | torch.compile | diffusers eager |" in page
    assert "| step, uncached, ms | 6 | **5** | 5.5 | 9 |" in page
    assert "| peak memory, MiB | **400** | **400** |" in page  # within 1 %
    assert "| step, uncached, ms | **3** | **30**" not in page
    assert "| step, uncached, ms | **3** | 30 |" in page
    assert "| predict, ms | 0.0123 |" in page
    assert "- demo model, float32: OpenVINO in step, uncached (1.20 times)" in page
    # All that are ahead, not only the first.
    assert "float32: torch.compile in step, uncached (1.09 times)" in page
    assert page.count(" times)") == 2
    assert "- demo: torch.compile float32: no compiler" in page
    assert "openvino 2026.4.1" in page
    [data] = json.loads(files[1].read_text())["runs"]
    assert "`scripts/bench --only demo,parts`, 2 minutes, 3 rounds" in page
    assert data["measures"][0]["rounds"]["OpenVINO float32"] == [4.0, 5.0, 90.0]
    assert data["measures"][0]["medians"]["OpenVINO float32"] == 5.0
    for file in files[2:]:
        with Image.open(file) as chart:
            assert chart.width > 1000
        assert f"]({file.name})" in page


def test_readme_gets_the_tables_between_its_marks(tmp_path: Path) -> None:
    save_bench(RESULT, tmp_path)
    readme = tmp_path / "R.md"
    begin = "<!-- benchmarks: written by scripts/bench -->"
    readme.write_text(f"before\n{begin}\nold\n<!-- end of benchmarks -->\nafter\n")
    for _ in range(2):
        update_readme(readme, tmp_path / "results.json")
    text = readme.read_text()
    assert text.startswith(
        f"before\n{begin}\ndemo model, 128 x 128, 50 steps, float32:"
    )
    assert text.endswith("<!-- end of benchmarks -->\nafter\n")
    assert "old" not in text
    assert "Where others are ahead:\n\n- demo model, float32: OpenVINO in step" in text
    readme.write_text("no marks")
    with pytest.raises(RequestError, match="needs the lines <!-- benchmarks"):
        update_readme(readme, tmp_path / "results.json")
    assert readme.read_text() == "no marks"


def test_the_readme_shows_the_results_that_are_there() -> None:
    data = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert summary(data) in readme
    assert not any(run["is_quick"] for run in data["runs"])
    assert "demo" in {name for run in data["runs"] for name in run["groups"]}


def test_figures_of_other_groups_stay(tmp_path: Path) -> None:
    parts = [m for m in RESULT.measures if m.group == "parts"]
    save_bench(RESULT, tmp_path)
    later = replace(
        RESULT,
        date="2026-02-03",
        groups=("parts",),
        sizes=(),
        not_run={},
        measures=(replace(parts[0], rounds={"max_diffusion float32": [9.0]}),),
    )
    save_bench(later, tmp_path)
    first, second = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert (first["date"], first["groups"]) == ("2026-01-02", ["demo"])
    assert {m["group"] for m in first["measures"]} == {"demo"}
    assert (second["date"], second["groups"]) == ("2026-02-03", ["parts"])
    page = (tmp_path / "README.md").read_text()
    assert "| predict, ms | 9 |" in page
    assert "0.0123" not in page
    assert "gone" not in page
    assert "| step, uncached, ms | 6 | **5** | 5.5 | 9 |" in page
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(RequestError, match="holds no results; choose another folder"):
        save_bench(later, tmp_path)
    with pytest.raises(
        RequestError, match="a group must be demo, flux-300m, cold, parts"
    ):
        bench(groups=("large",))


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
        (["--only", "demo, large"], "bench: a group must be demo, flux-300m, cold, pa"),
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
