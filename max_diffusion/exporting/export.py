"""All modules of a model for all targets, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Final, final

from ..core.files import check_folder, prepared_folder
from ..core.host_memory import host_memory
from ..core.validation import whole
from ..errors import CompileError, DeviceError, ModelLoadError, RequestError
from ..execution.artefacts import Artefact, artefacts_in
from ..execution.targets import Target, parse_target
from .job import Job, Model, modules_of, up_to_date

# What compiling the largest module of a model takes, at most.
_JOB_BYTES: Final = 3 * 2**30
_ERRORS: Final = {
    kind.exit_code: kind
    for kind in (CompileError, DeviceError, ModelLoadError, RequestError)
}


@final
@dataclass(frozen=True)
class Exported:
    """A module that lies compiled in a folder."""

    artefact: Artefact
    seconds: float
    """What compiling took; 0 if it was there already."""


@final
@dataclass(frozen=True)
class Export:
    """What is to be compiled, for what, and where it goes."""

    model: Model
    targets: Sequence[Target]
    output: Path
    modules: Sequence[str] = ()
    """Names of the modules to compile; all by default."""
    jobs: int | None = None
    """Processes at a time, of a core each; by default what cores and memory allow."""


def export_graphs(
    export: Export, check: Callable[[], None] = lambda: None
) -> Iterator[tuple[Exported, int]]:
    """Compiles every module for every target; what is there already stays.

    Needs a model's configurations and the names, shapes and dtypes of its weights; none
    is loaded.

    Args:
        export: What is to be compiled.
        check: Called twice a second; what it raises ends all processes.

    Yields:
        What has been compiled, or was there, and how many there will be in all.

    Raises:
        ModelLoadError: Files are missing or damaged.
        RequestError: The folder cannot be written to.
        CompileError: MAX refused a module; what was compiled before stays.
    """
    jobs = _default_jobs() if export.jobs is None else export.jobs
    whole("compile: jobs", jobs, minimum=1, maximum=256)
    check_folder(export.output)
    pipeline = export.model.open("cpu")
    prepared_folder(export.output)
    modules = modules_of(pipeline)
    if export.modules:
        modules = [module for module in modules if module.name in export.modules]
    pending: list[Job] = []
    total = len(modules) * len(export.targets)
    for target in export.targets:
        for module in modules:
            # For a GPU the graphs are others than those that were built here.
            there = None
            if target.gpu is None:
                there = up_to_date(module, export.output, target.name)
            if there is not None:
                yield Exported(there, 0.0), total
            else:
                output = str(export.output)
                pending.append(Job(export.model, module.name, _text(target), output))
    processes = Processes(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(processes.run, job) for job in pending}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                check()
                for future in done:
                    yield future.result(), total
        finally:
            for future in waiting:
                future.cancel()
            processes.end()


@final
class Processes:
    """Runs jobs, each in a process of its own, on a core of its own.

    Args:
        count: How many at a time.
    """

    def __init__(self, count: int) -> None:
        self._cores = _cores(count)
        self._lock = Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_ended = False

    def run(self, job: Job) -> Exported:
        """Compiles one module, in whatever thread.

        Raises:
            MaxDiffusionError: What the process said.
            CompileError: MAX ended it.
        """
        core = self._cores.get()
        try:
            code, output, errors = self._finished(job, core)
        finally:
            self._cores.put(core)
        if code != 0:
            lines = [line for line in errors.split("\n") if line.strip()]
            said = lines[-1].removeprefix("error: ") if lines else "it said nothing"
            kind = _ERRORS.get(code)
            if kind is not None:
                raise kind(said)
            raise CompileError(
                f"compile: {job.module} for {job.target}: its process ended with "
                f"{code} ({said})"
            )
        result = json.loads(output.splitlines()[-1])
        folder = Path(job.output) / parse_target(job.target).name
        [artefact] = (
            found
            for found in artefacts_in(folder, job.module)
            if found.manifest.key == result["key"]
        )
        return Exported(artefact, result["seconds"])

    def end(self) -> None:
        """Ends all processes; those that have not begun never will."""
        with self._lock:
            self._is_ended = True
            for process in self._running:
                process.kill()

    def _finished(self, job: Job, core: int | None) -> tuple[int, str, str]:
        with self._lock:
            if self._is_ended:
                raise CompileError("compile: ended before it began")
            process = subprocess.Popen(
                (sys.executable, "-m", "max_diffusion.exporting.worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(os.environ),  # not what MAX 26.7 sets in C
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C is heard here
            )
            self._running.add(process)
        try:
            told = json.dumps({**asdict(job), "core": core})
            output, errors = process.communicate(told)
        finally:
            with self._lock:
                self._running.discard(process)
        return process.returncode, output, errors


def _text(target: Target) -> str:
    """The target as ``parse_target`` reads it."""
    gpu = "" if target.gpu is None else f"{target.gpu}+"
    return gpu + target.host.name


def _cores(jobs: int) -> SimpleQueue[int | None]:
    """A core for each of the processes at a time, where they can be told."""
    cores: SimpleQueue[int | None] = SimpleQueue()
    own: list[int | None] = [None]
    if sys.platform == "linux":
        own = list(sorted(os.sched_getaffinity(0)))
    for index in range(jobs):
        cores.put(own[index % len(own)])
    return cores


def _default_jobs() -> int:
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, host_memory() // _JOB_BYTES))
