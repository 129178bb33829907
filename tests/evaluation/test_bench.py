"""The benchmark's plan and tables; nothing is timed, and workers are stand-ins."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from max_diffusion import RequestError
from max_diffusion.checkpoint import open_model
from max_diffusion.evaluation.bench import (
    BenchResult,
    Measure,
    bench,
    save_bench,
    update_readme,
)
from max_diffusion.evaluation.bench import run as bench_run
from max_diffusion.evaluation.bench.models import DEMO, LARGE, model_folder
from max_diffusion.evaluation.bench.report import summary
from max_diffusion.evaluation.bench.run import cache_of
from max_diffusion.evaluation.bench.runtimes import (
    RUNTIMES,
    TORCH,
    Environment,
    PeerError,
    Runtime,
)

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys
job = json.loads(sys.argv[1])
assert "{broken}" not in json.dumps(job), "a defect"
case = {{"picture_ms": 100.0, "full_step_ms": 2.0, "cached_step_ms": 0.5}}
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
    assert {r.label for r in RUNTIMES if r.environment and r.dtype == "float32"} == set(
        result.not_run
    ) - {"max_diffusion float32, demo, pab"}
    assert all("without --quick" in text for text in [*result.not_run.values()][:3])
    assert result.sizes == (DEMO,)
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
    assert found["flux-300m", "picture"] == {label: [100.0, 100.0]}
    assert found["demo", "start to first picture, cold"] == {label: [2.0]}
    # Its first picture is cut short.
    assert ("flux-300m", "start to first picture, warm") not in found
    assert found["parts", "TaylorSeer predict"]["MAX's own float32"] == [2.0, 2.0]
    assert ("demo", "step, pab") not in found
    assert result.not_run == {
        "max_diffusion float32, demo, pab": "no such cache",
        "max_diffusion float32, flux-300m, pab": "no such cache",
        "skipped steps": "it ended with 1: no memory",
    }
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_runtime_that_fails_is_listed_with_its_last_words(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workers / "draw_ours.py").write_text(WORKER.format(broken="float32"))
    (workers / "taylorseer.py").write_text("print('no figures')")
    monkeypatch.setattr(bench_run, "RUNTIMES", (ours(),))
    result = bench(is_quick=True, work=tmp_path)
    assert result.not_run["max_diffusion float32, demo"] == (
        "it ended with 1: AssertionError: a defect"
    )
    words = result.not_run["TaylorSeerCache, MAX's own float32"]
    assert "it printed no result: 'no figures" in words
    assert {measure.group for measure in result.measures} == {"parts"}


def test_what_progress_raises_ends_the_process_that_is_measured(
    workers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workers / "draw_ours.py").write_text(
        "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
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


def test_an_environment_that_cannot_be_made_is_a_peer_not_run(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="its environment is not made"):
        TORCH.python(tmp_path, may_install=False)
    assert list(tmp_path.iterdir()) == []
    bad = Environment("bad", ("./no such folder",))
    with pytest.raises(PeerError, match=r"pip failed: ERROR: .*no such folder"):
        bad.python(tmp_path, may_install=True)
    with pytest.raises(PeerError, match="its environment is not made"):
        bad.python(tmp_path, may_install=False)


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    empty = Environment("empty", ())
    (tmp_path / "environments" / "empty").mkdir(parents=True)
    folder = tmp_path / "environments" / "empty"
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    with pytest.raises(PeerError):
        empty.python(tmp_path, may_install=False)  # half made
    (folder / "installed").write_text(hashlib.sha256(sys.version.encode()).hexdigest())
    assert empty.python(tmp_path, may_install=False) == python
    with pytest.raises(PeerError):
        replace(empty, requirements=("other",)).python(tmp_path, may_install=False)


def test_the_large_model_is_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
    }
    module = "max_diffusion.evaluation.bench.models._LARGE_TRANSFORMER"
    monkeypatch.setattr(module, small)
    folder = model_folder(LARGE, tmp_path)
    assert open_model(folder).class_name == "FluxPipeline"
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


def test_rounds_are_checked() -> None:
    with pytest.raises(RequestError, match="rounds must be at least 1, got 0"):
        bench(rounds=0)


RESULT = BenchResult(
    is_quick=False,
    date="2026-01-02",
    rounds=3,
    sizes=(DEMO,),
    measures=(
        Measure(
            "demo",
            "step",
            "ms",
            {
                "OpenVINO float32": [4.0, 5.0, 90.0],
                "max_diffusion float32": [6.0, 5.5, 7.0],
                "max_diffusion bfloat16": [3.0],
                "torch.compile bfloat16": [30.0],
            },
        ),
        Measure("demo", "picture", "ms", {"max_diffusion float32": [300.4]}),
        Measure("parts", "predict", "ms", {"max_diffusion float32": [0.0123]}),
    ),
    not_run={"torch.compile float32": "no compiler"},
    versions={"OpenVINO float32": {"openvino": "2026.4.1"}},
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
    files = save_bench(RESULT, tmp_path / "b", "scripts/bench")
    page = files[0].read_text()
    assert "|  | max_diffusion | OpenVINO |" in page  # ours first
    assert "| step, uncached, ms | 6 | **5** |" in page
    assert "| step, uncached, ms | **3** | **30**" not in page
    assert "| step, uncached, ms | **3** | 30 |" in page
    assert "| predict, ms | 0.0123 |" in page
    assert "- demo model, step, uncached, float32: OpenVINO by 1.20 times" in page
    assert page.count(" by ") == 1
    assert "- torch.compile float32: no compiler" in page
    assert "openvino 2026.4.1" in page
    data = json.loads(files[1].read_text())
    assert data["command"] == "scripts/bench"
    assert data["measures"][0]["rounds"]["OpenVINO float32"] == [4.0, 5.0, 90.0]
    assert data["measures"][0]["medians"]["OpenVINO float32"] == 5.0
    for file in files[2:]:
        with Image.open(file) as chart:
            assert chart.width > 1000
        assert f"]({file.name})" in page


def test_readme_gets_the_tables_between_its_marks(tmp_path: Path) -> None:
    save_bench(RESULT, tmp_path, "scripts/bench")
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
    assert "Where others are ahead: demo model, step, uncached, float32: Open" in text
    readme.write_text("no marks")
    with pytest.raises(RequestError, match="needs the lines <!-- benchmarks"):
        update_readme(readme, tmp_path / "results.json")
    assert readme.read_text() == "no marks"


def test_the_readme_shows_the_results_that_are_there() -> None:
    data = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert summary(data) in readme
    assert not data["is_quick"]
