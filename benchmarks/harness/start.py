"""Whole processes, from the shell to a PNG, and what their time goes into."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .measures import Collection
from .runtimes import OURS, PeerError, environment

GROUP: Final = "start"
PROCESSES: Final = 4
"""Processes of each round."""
_WORKERS: Final = Path(__file__).with_name("workers")
_OURS: Final = f"{OURS} float32"
_THEIRS: Final = "OpenVINO float32"
_WHOLE: Final = "shell to PNG, {} steps{}"


@dataclass(frozen=True)
class StartJob:
    """One picture of the demo model."""

    prompt: str
    side: int
    steps: int
    text_tokens: int
    folder: Path
    """The model's."""
    their_folder: Path | None
    """The same for OpenVINO, if it can be run."""
    their_python: Path | None
    compiled: Path
    """Where OpenVINO keeps what it has compiled."""


def measure_starts(job: StartJob, found: Collection) -> None:
    """Measures one round: our command warm and without any cache, and OpenVINO.

    Args:
        job: What is drawn.
        found: Receives the seconds of whole processes, and of their stages.
    """
    whole = _WHOLE.format(job.steps, "")
    cold = _WHOLE.format(job.steps, ", empty cache")
    with tempfile.TemporaryDirectory() as folder:
        ways: list[tuple[str, str, Callable[[], float]]] = [
            (whole, _OURS, lambda: _timed(_command(job, folder), {})[0]),
            (cold, _OURS, lambda: _cold(job, folder)),
            (
                "shell to PNG, by stages",
                _OURS,
                lambda: _staged(job, found, _OURS, folder),
            ),
        ]
        if job.their_python is not None:
            ways.append((whole, _THEIRS, lambda: _staged(job, found, _THEIRS, folder)))
        for name, label, measure in ways:
            try:
                found.add(GROUP, name, "s", label, measure())
            except PeerError as err:
                found.refuse(GROUP, f"{label}, {name}", err)


def _cold(job: StartJob, folder: str) -> float:
    with tempfile.TemporaryDirectory() as fresh:
        return _timed(_command(job, folder), {"MODULAR_CACHE_DIR": fresh})[0]


def _command(job: StartJob, folder: str) -> list[str]:
    options = ("--model", str(job.folder), "--steps", str(job.steps), "--seed", "0")
    output = ("--output", f"{folder}/ours.png", "--device", "cpu")
    # What pip writes for a command: the interpreter, and the entry point.
    code = "from max_diffusion.cli.entry import main; main()"
    return [sys.executable, "-c", code, "generate", job.prompt, *options, *output]


def _timed(line: list[str], variables: Mapping[str, str]) -> tuple[float, str]:
    """Runs a process to its end; its seconds, and what it wrote."""
    started = time.perf_counter()
    # Not output_of, which looks twenty times a second whether it has ended.
    done = subprocess.run(
        line,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise PeerError(f"it ended with {done.returncode}: {said[-1][:300]}")
    return seconds, done.stdout


def _staged(job: StartJob, found: Collection, label: str, folder: str) -> float:
    """Adds the stages of a runtime; returns the seconds of its whole process."""
    is_ours = label == _OURS
    python = sys.executable if is_ours else str(job.their_python)
    worker = "start_ours.py" if is_ours else "start_openvino.py"
    told: dict[str, Any] = {
        "folder": str(job.folder if is_ours else job.their_folder),
        "prompt": job.prompt,
        "side": job.side,
        "steps": job.steps,
        "text_tokens": job.text_tokens,
        "dtype": "float32",
        "compile_cache": str(job.compiled),
        "output": f"{folder}/picture.png",
        "started": time.time(),
    }
    line = [python, str(_WORKERS / worker), json.dumps(told)]
    seconds, output = _timed(line, {})
    stages = json.loads(output.splitlines()[-1])["stages"]
    for name, value in stages.items():
        found.add(GROUP, f"of it: {name}", "s", label, value)
    found.add(GROUP, "of it: end", "s", label, seconds - sum(stages.values()))
    return seconds
