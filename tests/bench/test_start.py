"""Whole processes, from the shell to a PNG."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.harness.measures import Collection
from benchmarks.harness.start import StartJob, measure_starts

OURS, THEIRS = "max_diffusion float32", "OpenVINO float32"


def job_of(folder: Path, python: Path | None) -> StartJob:
    return StartJob("a", 128, 50, 32, folder, folder, python, folder / "compiled")


def test_both_are_measured_with_their_stages(workers: Path, tmp_path: Path) -> None:
    found = Collection()
    for _ in range(2):
        measure_starts(job_of(tmp_path, Path(sys.executable)), found)
    assert found.not_run == {}
    rounds = {name: each.rounds for (_, name), each in found.measures.items()}
    assert rounds["of it: imports"] == {OURS: [0.01] * 2, THEIRS: [0.01] * 2}
    assert {*rounds["shell to PNG, 50 steps"]} == {OURS, THEIRS}
    assert {*rounds["shell to PNG, 50 steps, empty cache"]} == {OURS}
    # What no stage has is the end: theirs takes its runtime down.
    [first, _] = rounds["of it: end"][THEIRS]
    whole = rounds["shell to PNG, 50 steps"][THEIRS][0]
    assert first == pytest.approx(whole - 0.03)


def test_what_cannot_be_run_is_told(workers: Path, tmp_path: Path) -> None:
    (workers / "start_openvino.py").write_text("raise RuntimeError('no such op')")
    found = Collection()
    measure_starts(job_of(tmp_path, Path(sys.executable)), found)
    assert found.not_run["start"] == {
        f"{THEIRS}, shell to PNG, 50 steps": "it ended with 1: RuntimeError: no such op"
    }
    assert {OURS} == {*found.measures["start", "of it: draw"].rounds}


def test_without_the_other_ours_is_measured(workers: Path, tmp_path: Path) -> None:
    found = Collection()
    measure_starts(job_of(tmp_path, None), found)
    assert found.not_run == {}
    assert {label for each in found.measures.values() for label in each.rounds} == {
        OURS
    }
