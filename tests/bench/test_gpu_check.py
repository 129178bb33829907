"""The check that needs a GPU: all of it at a tiny size on the CPU, and its errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

from benchmarks.gpu import check as gpu_check_module
from benchmarks.gpu import plan as gpu_plan
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.check import gpu_check
from benchmarks.gpu.device_memory import Peak, watched
from benchmarks.gpu.gpu_tests import run_tests
from benchmarks.gpu.page import save_gpu_check
from benchmarks.gpu.plan import PARTS, GpuPlan, GpuResult
from benchmarks.gpu.sizes import FULL, SIZES, TINY
from benchmarks.harness.runtimes import PeerError
from max_diffusion import DeviceError, RequestError
from max_diffusion.errors import RequestCancelled

ROOT = Path(__file__).parents[2]
OURS, THEIRS = "max_diffusion float32", "diffusers eager float32"
TESTS = """
import os
import pytest
pytestmark = pytest.mark.gpu
def test_passes(record_property):
    record_property("device", os.environ["MAX_DIFFUSION_TEST_DEVICE"])
    record_property("graphs", os.environ["MAX_DIFFUSION_TEST_GRAPHS"])
"""
FAILING = """
def test_fails():
    assert 1 == 2, "as it should"
def test_is_left_out():
    pytest.skip("no need")
"""
TRY = GpuPlan(size=TINY, device="cpu", rounds=1, is_eager=True)


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


def figures(result: GpuResult) -> dict[tuple[str, str], dict[str, float]]:
    return {(m.group, m.name): m.medians for m in result.measures}


@pytest.mark.parametrize(
    "parts",
    [
        # A step runs what parity does, and memory what pictures do.
        ("tests", "parity", "picture"),
        pytest.param(PARTS, marks=pytest.mark.slow),
    ],
    ids=["most", "all"],
)
def test_all_of_it_at_a_tiny_size(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, parts: tuple[str, ...]
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    words = ("--size", "tiny", "--device", "cpu", "--eager", "--rounds", "1")
    files = ("--work", "w", "--tests", "test_it.py", "-o", "out", "--json")
    code, output, errors = run(*words, "--only", ",".join(parts), *files)
    assert (code, errors) == (0, "")
    found = json.loads(output)
    charts = [f"gpu-{part}.png" for part in ("step", "picture") if part in parts]
    names = ["gpu.md", "gpu.json", *charts]
    assert found["files"] == [f"out/{name}" for name in names]
    assert all((tmp_path / path).stat().st_size > 0 for path in found["files"])
    assert (found["failures"], found["not_run"]) == ([], {})
    assert found["parts"] == list(parts)
    assert found["tests"]["passed"] == 1
    [measured] = found["tests"]["measured"].values()
    assert measured["device"] == "cpu"
    medians = {(m["group"], m["name"]): m["medians"] for m in found["measures"]}
    units = {(m["group"], m["name"]): m["unit"] for m in found["measures"]}
    for part, name, unit in (
        ("parity", "error to float32", "%"),
        ("parity", "PSNR to float32", "dB"),
        ("step", "step", "ms"),
        ("step", "load", "s"),
        ("picture", "picture", "ms"),
        ("picture", "picture, taylorseer", "ms"),
        ("memory", "host, at most", "MiB"),
    ):
        if part not in parts:
            continue
        assert medians[part, name].keys() == {OURS, THEIRS}, name
        assert units[part, name] == unit
    # The same weights, inputs, noise and texts in both.
    assert medians["parity", "error to float32"][OURS] < 0.01
    if "step" in parts:
        assert medians["step", "error to diffusers eager"][OURS] < 0.01
    assert medians["picture", "PSNR to ours"][THEIRS] > 50
    assert medians["picture", "PSNR to ours, taylorseer"][THEIRS] > 50
    full = medians["picture", "full steps, taylorseer"]
    assert full[OURS] == full[THEIRS] < TINY.steps
    page = (tmp_path / "out/gpu.md").read_text()
    assert "| picture, uncached, ms |" in page
    assert "1 passed, 0 failed, 0 did not run" in page
    assert f"`{found['command']}`" in page
    data = json.loads((tmp_path / "out/gpu.json").read_text())
    assert data["runs"] == [{k: v for k, v in found.items() if k != "files"}]


def test_without_a_gpu_it_says_so(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_plan, "accelerator_count", lambda: 0)
    assert run() == (
        5,
        "",
        "error: gpu_check: MAX sees no GPU here; run it on a machine with one, or try "
        "its code by --size tiny --device cpu\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "step,speed"], "gpu_check: a part must be tests, parity, step"),
        (["--rounds", "0"], "gpu_check: rounds must be at least 1, got 0"),
        (["--minutes", "-1"], "gpu_check: minutes must be above 0, got -1"),
        (["--device", "auto"], "device must be cpu, gpu or gpu:INDEX, got 'auto'"),
        (["--size", "huge"], "argument --size: invalid choice: 'huge'"),
        (["--device", "cpu", "-o", "/dev/null"], "/dev/null"),
        (["--min", "1"], "unrecognized arguments: --min 1"),
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


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "accelerator_count", lambda: 2)
    GpuPlan(device="gpu:1").check()
    with pytest.raises(DeviceError, match=r"MAX sees 2 GPUs here; use gpu:0 to gpu:1"):
        GpuPlan(device="gpu:2").check()


def test_the_script_runs_it() -> None:
    script = (ROOT / "scripts" / "gpu_check").read_text(encoding="utf-8")
    assert "-m benchmarks.gpu " in script
    assert (ROOT / "scripts" / "gpu_check").stat().st_mode & 0o111


# What goes wrong is written down.


class Workers:
    """Stands in for the processes: answers by worker, what it was asked for."""

    def __init__(self, **answers: dict[str, Any] | PeerError) -> None:
        self.answers: dict[str, dict[str, Any] | PeerError] = {
            "device": {"name": "cpu", "targets": []},
            "folder": {},
            **answers,
        }
        self.jobs: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, line: list[str], **options: Any) -> str:
        worker = line[2].rpartition(".")[2]
        job = json.loads(line[3])
        what = job["what"] if job["what"] == "device" else worker
        self.jobs.append((what, job))
        options["on_wait"]()
        if what == "folder":
            path = Path(job["folder"]) / "transformer"
            path.mkdir(parents=True)
            demo = ROOT / "max_diffusion/demo_model/transformer/config.json"
            (path / "config.json").write_text(demo.read_text())
        answer = self.answers[what]
        if isinstance(answer, PeerError):
            raise answer
        if job["what"] == "step":
            is_exact = job["dtype"] == "float32"
            error = 0.0 if is_exact else float(answer.get("error", 0.0))
            values = np.array([1.0, 2.0]) * (1 + error)
            np.save(f"{job['output']}-step.npy", values)
        return f"noise\n{json.dumps(answer)}\n"


STEP = {"load_seconds": 2.0, "compile_seconds": 60.0, "step_ms": [9.0, 5.0, 6.0]}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workers]:
    def install(**answers: Any) -> Workers:
        found = Workers(**answers)
        monkeypatch.setattr(gpu_check_module, "output_of", found)
        return found

    return install


def test_rounds_take_turns_and_compile_once(
    workers: Callable[..., Workers], tmp_path: Path
) -> None:
    asked = workers(ours=STEP, theirs=STEP)
    plan = replace(TRY, parts=("step",), rounds=3, precompiled=[tmp_path / "graphs"])
    found = gpu_check(plan, tmp_path)
    runs = [name for name, _ in asked.jobs]
    assert runs[:2] == ["device", "folder"]
    assert runs[2:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert asked.jobs[2][1]["precompiled"] == [str(tmp_path / "graphs")]
    by_name = {m.name: m.rounds for m in found.measures}
    assert by_name["step"][OURS] == [6.0] * 3
    assert by_name["compile"][OURS] == [60.0]
    assert by_name["compile, kept on disk"][THEIRS] == [60.0] * 2


def test_a_step_far_from_float32_s_is_a_failure(
    workers: Callable[..., Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "accelerator_count", lambda: 1)
    monkeypatch.setattr(GpuPlan, "check", lambda plan: None)
    plan = GpuPlan(size=TINY, parts=("parity",), is_eager=True)
    for error, is_wrong in ((0.014, False), (0.016, True)):
        workers(ours={**STEP, "error": error}, theirs={**STEP, "error": 0.01})
        found = gpu_check(plan, tmp_path)
        assert bool(found.failures) == is_wrong
        medians = figures(found)["parity", "error to float32"]
        assert medians["max_diffusion bfloat16"] == pytest.approx(100 * error)
    [words] = found.failures
    assert words == (
        "parity: a step must be within 0.015 of float32's, which is 1.5 times "
        "diffusers eager's error, got 0.016"
    )


def test_a_runtime_that_fails_is_told_and_the_rest_goes_on(
    workers: Callable[..., Workers], tmp_path: Path
) -> None:
    workers(ours=PeerError("it ended with 1: no memory"), theirs=STEP)
    found = gpu_check(replace(TRY, parts=("step",)), tmp_path)
    assert found.not_run == {"step": {OURS: "it ended with 1: no memory"}}
    assert found.failures == (f"step: {OURS}: it ended with 1: no memory",)
    assert figures(found)["step", "step"] == {THEIRS: 6.0}
    save_gpu_check(found, tmp_path / "out")
    page = (tmp_path / "out/gpu.md").read_text()
    assert f"- step: {OURS}: it ended with 1: no memory" in page


def test_a_device_that_cannot_be_used_is_one_error(
    workers: Callable[..., Workers], tmp_path: Path
) -> None:
    workers(device=PeerError("it ended with 1: driver too old"))
    with pytest.raises(DeviceError, match="MAX cannot use cpu: it ended with 1: driv"):
        gpu_check(TRY, tmp_path)


def test_nothing_begins_when_the_time_is_over(
    workers: Callable[..., Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = workers(ours=STEP, theirs=STEP)
    # Each look at the clock takes half a minute.
    clock = iter(range(0, 10**6, 30))
    monkeypatch.setattr("benchmarks.gpu.check.time.perf_counter", lambda: next(clock))
    plan = replace(TRY, parts=("step", "memory"), rounds=3, minutes=2.2)
    found = gpu_check(plan, tmp_path)
    assert found.not_run == {
        "step": {"the rest": "the 2.2 minutes were over"},
        "memory": {"the rest": "the 2.2 minutes were over"},
    }
    assert found.parts == ("step",)
    assert found.failures == ()
    assert 2 < len(asked.jobs) < 5
    assert figures(found)["step", "step"]


def test_too_small_a_disk_is_said(
    workers: Callable[..., Workers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers()
    usage = type("Usage", (), {"free": 5 * 2**30})
    monkeypatch.setattr("benchmarks.gpu.check.shutil.disk_usage", lambda _: usage)
    found = gpu_check(replace(TRY, size=FULL, parts=("step",)), tmp_path)
    assert found.failures == (
        f"step: the model takes 33 GiB, but {tmp_path} has 5 left; give another folder "
        "by --work",
    )


def test_what_progress_raises_ends_it(
    workers: Callable[..., Workers], tmp_path: Path
) -> None:
    workers()

    def stop(share: float, words: str) -> None:
        raise RequestCancelled("stopped")

    with pytest.raises(RequestCancelled):
        gpu_check(TRY, tmp_path, stop)


def test_figures_of_other_parts_stay(
    workers: Callable[..., Workers], tmp_path: Path
) -> None:
    workers(ours=STEP, theirs=STEP)
    step = gpu_check(replace(TRY, parts=("step",)), tmp_path)
    save_gpu_check(step, tmp_path / "out")
    parity = gpu_check(replace(TRY, parts=("parity",)), tmp_path)
    for _ in range(2):
        save_gpu_check(parity, tmp_path / "out")
    runs = json.loads((tmp_path / "out/gpu.json").read_text())["runs"]
    assert [run["parts"] for run in runs] == [["step"], ["parity"]]
    (tmp_path / "out/gpu.json").write_text('{"runs": [{}]}')
    with pytest.raises(RequestError, match=r"gpu\.json holds no results of it; choose"):
        save_gpu_check(parity, tmp_path / "out")


# Tests and memory.


def test_tests_that_fail_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS + FAILING)
    report = tmp_path / "tests.xml"
    found = run_tests(
        [tmp_path / "test_it.py"],
        "gpu:1",
        report=report,
        precompiled=[Path("/a"), Path("/b")],
        limit_seconds=120,
        on_wait=lambda: None,
    )
    assert found.passed == 1
    [(failed, words)] = found.failed.items()
    assert failed.endswith("test_fails")
    assert words == "AssertionError: as it should"
    assert list(found.left_out.values()) == ["no need"]
    [measured] = found.measured.values()
    assert measured == {"device": "gpu:1", "graphs": "/a:/b"}


def test_tests_that_do_not_come_to_their_end(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="it ended with 4"):
        run_tests(
            [tmp_path / "nothing.py"],
            "cpu",
            report=tmp_path / "no" / "tests.xml",
            limit_seconds=120,
            on_wait=lambda: None,
        )


def test_gpu_tests_are_only_run_on_request() -> None:
    line = (
        "-m",
        "pytest",
        "tests/gpu",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
    )
    done = processes.run(sys.executable, *line, cwd=ROOT)
    assert "deselected" in done.stdout
    assert "0 selected" in done.stdout or "no tests collected" in done.stdout


def test_the_driver_is_asked_what_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    script = tmp_path / "nvidia-smi"
    script.write_text(
        f"#!/bin/sh\necho $@ > {told}\nprintf '100\\n350\\n[N/A]\\n200\\n'\n"
        f"touch {told}.done\nexec sleep 60\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with watched("gpu:1") as peak:
        while not (tmp_path / "told.done").exists():
            pass
    assert peak == Peak(250.0)
    assert "-i 6 " in told.read_text()
    with watched("cpu") as peak:
        pass
    assert peak == Peak(None)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with watched("gpu") as peak:
        pass
    assert peak == Peak(None)


def test_the_full_size_is_flux_s() -> None:
    transformer = FULL.configs["transformer"]
    assert (transformer["num_layers"], transformer["num_single_layers"]) == (19, 38)
    assert (FULL.side, FULL.text_tokens, FULL.steps) == (1024, 512, 28)
    assert set(SIZES) == {"full", "tiny"}
