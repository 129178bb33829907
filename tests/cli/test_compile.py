"""``max-diffusion compile``, and what its processes do."""

from __future__ import annotations

import errno
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest

from max_diffusion import CompileError, ModelLoadError
from max_diffusion.execution.artefacts import Manifest, artefacts_in
from max_diffusion.execution.graph_library import shipped_graphs
from max_diffusion.execution.targets import HOSTS, host_targets
from max_diffusion.exporting import Model, export
from max_diffusion.exporting.job import Job, locked

COMMAND = str(Path(sys.executable).with_name("max-diffusion"))
OWN = host_targets()[0].name


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A folder that has all of the demo model's graphs."""
    shutil.copytree(shipped_graphs(), tmp_path / "graphs")
    return tmp_path / "graphs"


def test_what_is_there_stays(full: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in full.rglob("*")}
    words = ("compile", "demo", "--output", full, "--caches", "all")
    targets = ("--target", "x86-64-v3", "--target", "linux-aarch64")
    done = processes.run(COMMAND, *words, *targets)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * 7  # all but the group modules
    assert all(line.endswith(" MiB, was there") for line in lines)
    assert {path: path.stat().st_mtime_ns for path in full.rglob("*")} == before


def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path):
        (tmp_path / "x").write_text("written")
    assert (tmp_path / "x").read_text() == "written"


def test_json_tells_every_module(full: Path) -> None:
    done = processes.run(COMMAND, "compile", "demo", "-o", full, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout)["graphs"]
    assert {row["module"] for row in rows} == {
        *("text_encoder", "text_encoder_2", "transformer.full", "vae", "sampler")
    }
    for row in rows:
        assert row["target"] == OWN
        assert row["seconds"] == 0
        assert Path(row["file"]).stat().st_size == row["bytes"]


def test_old_manifests_are_written_anew(full: Path) -> None:
    """Sources that changed, but not the graphs they build."""
    before: dict[Path, Manifest] = {}
    for found in artefacts_in(full / OWN, "vae"):  # of both demo models
        path = found.folder / f"{found.manifest.stem}.json"
        before[path] = found.manifest
        path.write_text(replace(found.manifest, recipe="old").to_json())
    done = processes.run(COMMAND, "compile", "demo", "-o", full)
    assert (done.returncode, done.stderr) == (0, "")
    after = {path: Manifest.from_json(path.read_text()) for path in before}
    assert sum(after[path] == before[path] for path in before) == 1
    assert sum(manifest.recipe == "old" for manifest in after.values()) == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--target", "native"), 2, "target: expected linux-x86-64-v4-bf16, "),
        (("--target", "cuda:90 "), 2, "target: expected a GPU such as cuda:sm_90"),
        (("--jobs", "0"), 2, "compile: jobs must be at least 1, got 0"),
        (("--caches", "nothing"), 2, "--caches: expected all, or none, taylorseer"),
        (("--target", "cuda:sm_90+"), 2, "target: expected linux-x86-64-v4-bf16, "),
        (("--dtype", "int8"), 2, "argument --dtype: invalid choice: 'int8'"),
        ((), 3, "nowhere at all"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    model = "demo" if words else "nowhere at all"
    done = processes.run(COMMAND, "compile", model, "-o", tmp_path / "x", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_an_output_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    done = processes.run(COMMAND, "compile", "demo", "-o", tmp_path / "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: output: {tmp_path / 'x'} cannot be made ({tmp_path / 'x'} is no "
        "folder); choose another folder\n"
    )


def test_graphs_for_another_machine(tmp_path: Path) -> None:
    """The smallest module, for a processor that this is not."""
    job = Job(Model(), "sampler", "linux-aarch64", str(tmp_path))
    done = export.Processes(1).run(job)
    manifest = done.artefact.manifest
    assert done.seconds > 0
    assert manifest.target == "linux-aarch64"
    assert {"euler_step", "guidance", "relative_error"} < set(manifest.graphs)
    mef = lzma.decompress(done.artefact.packed())
    start = mef.index(b"\x7fELF")
    assert int.from_bytes(mef[start + 18 : start + 20], "little") == 183  # AArch64
    # Again: it is there.
    assert export.Processes(1).run(job).seconds == 0


@pytest.mark.slow
def test_graphs_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    job = Job(Model(), "sampler", "cuda:sm_90+x86-64-v4", str(tmp_path))
    done = export.Processes(1).run(job)
    assert done.artefact.folder.name == "cuda-sm_90-linux-x86-64-v4"
    assert b"sm_90" in lzma.decompress(done.artefact.packed())


def test_a_process_ends_with_the_one_that_asked(tmp_path: Path) -> None:
    """Whatever ended that: nothing goes on compiling for minutes."""
    script = (
        "import os, time; from max_diffusion.exporting.worker import _watch;"
        "print(os.getpid(), flush=True); _watch(os.getppid())"
    )
    code = (
        "import os, subprocess, sys, time\n"
        f"line = (sys.executable, '-c', {script!r})\n"
        "subprocess.Popen(line, start_new_session=True)\n"
        "time.sleep(5)\n"
        "os._exit(3)\n"
    )
    done = processes.run(sys.executable, "-c", code)
    assert done.returncode == 3, done.stderr
    child = int(done.stdout)
    for _ in range(50):
        if not Path(f"/proc/{child}").exists():
            break
        time.sleep(0.2)
    assert not Path(f"/proc/{child}").exists()


def test_what_a_process_says_is_said(tmp_path: Path) -> None:
    job = Job(Model(str(tmp_path / "gone")), "sampler", OWN, str(tmp_path))
    with pytest.raises(ModelLoadError, match="gone"):
        export.Processes(1).run(job)


def test_a_process_that_aborts_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MAX does of a target that its compiler does not know."""

    class Aborted:
        returncode = -6

        def communicate(self, told: str) -> tuple[str, str]:
            assert json.loads(told)["module"] == "sampler"
            return "", "'bogus' is not recognized\nLLVM ERROR: 64-bit code\n"

    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: Aborted())
    job = Job(Model(), "sampler", OWN, str(tmp_path))
    at_once = export.Processes(1)
    for _ in range(2):  # its core is free again
        with pytest.raises(CompileError) as caught:
            at_once.run(job)
    assert str(caught.value) == (
        f"compile: sampler for {OWN}: its process ended with -6 (LLVM ERROR: 64-bit "
        "code)"
    )


def test_ctrl_c_ends_what_compiles(tmp_path: Path) -> None:
    """At once, although MAX would go on for minutes; what was compiled stays."""
    words = (COMMAND, "compile", "demo", "-o", str(tmp_path), "--jobs", "1")
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MODULAR_CACHE_DIR": str(tmp_path / "cache")},
    ) as process:
        time.sleep(6)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert (process.returncode, output) == (130, "")
    assert errors == "cancelled: stopped by Ctrl-C, what was compiled stays\n"


def test_help_names_every_target() -> None:
    done = processes.run(sys.executable, "-m", "max_diffusion", "compile", "--help")
    whole = re.sub(r"-\s+", "-", done.stdout)  # names may be broken at hyphens
    assert [word for word in re.findall(r"[\w-]+(?=,)", whole) if word in HOSTS] == [
        *HOSTS
    ]


def test_every_target_has_graphs_that_ship() -> None:
    assert {path.name for path in shipped_graphs().iterdir()} == set(HOSTS)
