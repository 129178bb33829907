"""Nothing that a benchmark would measure runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bench_workers import PARTS, STAGES, WORKER

from benchmarks.harness import run as bench_run
from benchmarks.harness import start
from benchmarks.harness.runtimes import RUNTIMES


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for what is measured, and no pauses."""
    folder = tmp_path / "workers"
    folder.mkdir()
    for name in {runtime.worker for runtime in RUNTIMES}:
        (folder / name).write_text(WORKER.format(broken="nothing is"))
    (folder / "taylorseer.py").write_text(PARTS)
    (folder / "skipped.py").write_text("import sys; sys.exit('no memory')")
    (folder / "start_ours.py").write_text(STAGES)
    (folder / "start_openvino.py").write_text(STAGES)
    monkeypatch.setattr(bench_run, "_WORKERS", folder)
    monkeypatch.setattr(start, "_WORKERS", folder)
    monkeypatch.setattr(start, "_command", lambda job, own: [sys.executable, "-c", ""])
    monkeypatch.setattr("time.sleep", lambda _: None)
    return folder
