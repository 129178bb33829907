"""Runs the tests that need a GPU, and reads what became of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from benchmarks.harness.runtimes import PeerError
from benchmarks.harness.worker_process import output_of

ROOT: Final = Path(__file__).parents[2]
GPU_TESTS: Final = (ROOT / "tests" / "gpu",)


@dataclass(frozen=True)
class TestsResult:
    """What became of the tests."""

    __test__ = False  # pytest, this is no test

    passed: int
    """How many passed."""
    failed: dict[str, str]
    """The first line of what went wrong, by test."""
    left_out: dict[str, str]
    """Why a test did not run, by test."""
    seconds: float
    """What they took."""
    measured: dict[str, dict[str, str]] = field(default_factory=dict)
    """What passing tests measured, by test."""


def run_tests(
    paths: Sequence[Path],
    device: str,
    *,
    report: Path,
    precompiled: Sequence[Path] = (),
    limit_seconds: float,
    on_wait: Callable[[], None],
) -> TestsResult:
    """Runs the tests marked ``gpu``, in one process.

    Args:
        paths: Files or folders.
        device: Where they run.
        report: File for pytest's own report.
        precompiled: Folders of compiled graphs.
        limit_seconds: Seconds after which they are ended.
        on_wait: Called twice a second; what it raises ends the tests.

    Raises:
        PeerError: pytest did not come to its end.
    """
    line = [sys.executable, "-m", "pytest", *map(str, paths), "-m", "gpu", "-q"]
    line += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    line += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    line += ["-o", "junit_family=xunit1"]  # the other has no properties of a test
    error: PeerError | None = None
    try:
        output_of(
            line,
            variables={
                "MAX_DIFFUSION_TEST_DEVICE": device,
                "MAX_DIFFUSION_TEST_GRAPHS": os.pathsep.join(map(str, precompiled)),
                "PYTHONPATH": str(ROOT),
            },
            limit_seconds=limit_seconds,
            on_wait=on_wait,
        )
    except PeerError as err:
        error = err  # also where tests failed, which the report tells better
    with suppress(OSError, ElementTree.ParseError):
        found = _read(report)
        if found.passed or found.failed or found.left_out:
            return found
    raise error or PeerError("pytest wrote no report")


def _read(report: Path) -> TestsResult:
    failed, left_out, measured = {}, {}, {}
    passed, seconds = 0, 0.0
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        seconds += float(case.get("time", 0))
        problems = [*case.iter("failure"), *case.iter("error")]
        skips = [*case.iter("skipped")]
        if problems:
            failed[name] = _first_line(problems[0])
        elif skips:
            left_out[name] = _first_line(skips[0])
        else:
            passed += 1
            found = {
                item.get("name", ""): item.get("value", "")
                for item in case.iter("property")
            }
            if found:
                measured[name] = found
    return TestsResult(passed, failed, left_out, seconds, measured)


def _first_line(element: ElementTree.Element) -> str:
    return (element.get("message") or "").strip().partition("\n")[0][:300]
