"""The benchmark's tables and charts, and the README's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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
from benchmarks.harness.models import (
    DEMO,
)
from benchmarks.harness.report import summary
from max_diffusion import RequestError

ROOT = Path(__file__).parents[2]


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
        "target": "linux-x86-64-v3",
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
        f"before\n{begin}\ndemo model, 128 x 128, 50 steps, float32; "
    )
    assert "float32; P (linux-x86-64-v3), 2 cores, 23.5 GiB, 2026-01-02:\n" in text
    assert text.endswith("<!-- end of benchmarks -->\nafter\n")
    assert "old" not in text
    assert "(benchmarks/README.md#where-others-are-ahead)" in text
    assert "- demo model, float32: OpenVINO in step" not in text
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "## Where others are ahead\n\n- demo model, float32: OpenVINO in step" in page
    )
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
    second, first = json.loads((tmp_path / "results.json").read_text())["runs"]
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
        RequestError, match="a group must be demo, flux-300m, start, cold"
    ):
        bench(groups=("large",))
