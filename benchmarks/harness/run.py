"""Runs the workers in turn, one process each, and collects what they measured."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from max_diffusion.caches import (
    CALIBRATION_FILE,
    AbstractCacheConfig,
    Calibration,
    TaylorSeerConfig,
    cache_from_options,
)
from max_diffusion.core.files import prepared_folder
from max_diffusion.evaluation.drawing import BASELINE as NO_CACHE
from max_diffusion.evaluation.drawing import OnProgress
from max_diffusion.evaluation.machine import machine
from max_diffusion.pipelines.opening import demo_model_path

from .measures import BenchResult, Collection
from .models import DEMO, Size, model_digest, model_folder
from .plan import GROUPS, ROUNDS, Plan
from .runtimes import (
    OPENVINO,
    OURS,
    RUNTIMES,
    Environment,
    PeerError,
    Runtime,
    described,
    exported,
)
from .start import PROCESSES, StartJob, measure_starts
from .worker_process import output_of

_LIMIT_SECONDS: Final = 3600.0  # of a process
_WORKERS: Final = Path(__file__).with_name("workers")
_PROMPT: Final = "a red circle above a blue square"
_TEXT_TOKENS: Final = 32  # the most that the models read
_LOADED: Final = ("taylorseer",)  # caches that the command line compiles and loads


def default_work_folder() -> Path:
    """The folder in which environments and models of the benchmark are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "max-diffusion" / "bench"


def bench(
    *,
    is_quick: bool = False,
    groups: Sequence[str] = GROUPS,
    rounds: int = ROUNDS,
    work: Path | None = None,
    on_progress: OnProgress | None = None,
) -> BenchResult:
    """Measures max_diffusion against what else could be used, side by side.

    Each runtime is a process of its own, in turn, with pauses between: MAX's threads
    spin for a while after a call, and would starve a neighbour. Peers live in
    environments of their own, which are made the first time and take a few GB. A peer
    that cannot be run is in ``not_run``.

    Args:
        is_quick: The demo model in float32 with no cache and TaylorSeer only, as
            ``generate`` has compiled it, one round, and only peers whose environments
            are there: under 3 minutes.
        groups: Which of :data:`GROUPS` to measure.
        rounds: Processes of each runtime; medians are over these.
        work: Where environments and models are kept; default
            :func:`default_work_folder`.
        on_progress: See :data:`OnProgress`; what it raises ends the benchmark.

    Returns:
        All figures, and why what could not be run was not.

    Raises:
        RequestError: ``rounds`` is out of range, or there is no such group.
    """
    plan = Plan.of(is_quick=is_quick, groups=groups, rounds=rounds)
    folder = (work or default_work_folder()).absolute()
    return _Runner(plan, folder, on_progress).run()


class _Runner:
    """The benchmark as it goes on."""

    def __init__(self, plan: Plan, work: Path, on_progress: OnProgress | None) -> None:
        self._plan = plan
        self._work = work
        self._on_progress = on_progress
        self._runtimes = [
            r for r in RUNTIMES if not plan.is_quick or r.dtype == "float32"
        ]
        self._pause = 1.0 if plan.is_quick else 3.0
        self._found = Collection()
        self._pythons: dict[Environment, Path] = {}
        self._folders: dict[tuple[str, bool], Path] = {}
        self._done = 0
        all_rounds = [min(plan.rounds, size.max_rounds) for size in plan.sizes]
        alone = [r for r in self._runtimes if self._starts_alone(r)]
        self._planned = len(self._runtimes + alone) * sum(all_rounds)
        self._planned += 3 * plan.rounds * ("parts" in self._plan.groups)
        self._planned += PROCESSES * plan.rounds * ("start" in self._plan.groups)
        self._planned += len(self._runtimes) // 2 * ("cold" in self._plan.groups)
        if not plan.is_quick:
            self._planned += len(self._runtimes + alone) * len(self._plan.sizes)

    def run(self) -> BenchResult:
        started = time.perf_counter()
        prepared_folder(self._work)
        ready = {size.name: self._prepared(size) for size in self._plan.sizes}
        for size in self._plan.sizes:
            runtimes = ready[size.name]
            for turn in range(min(self._plan.rounds, size.max_rounds)):
                # Another comes first in each round.
                at = turn % max(1, len(runtimes))
                for runtime in (*runtimes[at:], *runtimes[:at]):
                    self._draw(runtime, size, kind="round")
                    if self._starts_alone(runtime):
                        self._draw(runtime, size, kind="start")
        if "cold" in self._plan.groups:
            for runtime in self._runtimes:
                if runtime.dtype == "float32" and self._prepare(runtime, DEMO):
                    self._draw(runtime, DEMO, kind="cold")
        if "start" in self._plan.groups:
            self._measure_starts()
        if "parts" in self._plan.groups:
            self._measure_parts()
            if not self._plan.is_quick:
                self._measure_skips()
        return BenchResult(
            is_quick=self._plan.is_quick,
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            rounds=self._plan.rounds,
            groups=self._plan.groups,
            sizes=self._plan.sizes,
            measures=tuple(self._found.measures.values()),
            not_run=self._found.not_run,
            versions=self._found.versions,
            command=self._plan.command,
            machine=machine(),
            seconds=time.perf_counter() - started,
        )

    def _prepared(self, size: Size) -> list[Runtime]:
        """Runtimes with all that they need, and compiled; notes why of the others."""
        ready = [runtime for runtime in self._runtimes if self._prepare(runtime, size)]
        if not self._plan.is_quick:
            for runtime in ready:
                if runtime.compiles:
                    self._draw(runtime, size, kind="first")
                if self._starts_alone(runtime):
                    self._draw(runtime, size, kind="first start")
        failed = self._found.not_run.get(size.name, {})
        return [
            runtime
            for runtime in ready
            if _name(runtime, "first") not in failed
            and _name(runtime, "first start") not in failed
        ]

    def _caches(self, runtime: Runtime, size: Size) -> list[str]:
        """The caches to draw with; the quick form has what the command line loads."""
        wanted = _LOADED if self._plan.is_quick else size.caches
        return [name for name in wanted if name in runtime.caches]

    def _starts_alone(self, runtime: Runtime) -> bool:
        """Whether its start is measured by a process that draws nothing else.

        Ours loads the graphs of the caches that it is to draw with: the start is with
        those that the command line loads. Others load all that they have anyway.
        """
        return runtime.is_ours and not (
            self._plan.is_quick or {*runtime.caches} <= {*_LOADED}
        )

    def _prepare(self, runtime: Runtime, size: Size) -> bool:
        """Makes an environment and exports a model, if a runtime needs that."""
        own = runtime.environment
        try:
            if own is not None and own not in self._pythons:
                self._tell(f"the environment of {runtime.name}")
                self._pythons[own] = own.python(
                    self._work, may_install=not self._plan.is_quick
                )
            self._folder(runtime, size)
        except PeerError as err:
            self._found.refuse(size.name, runtime.label, err)
            return False
        return True

    def _folder(self, runtime: Runtime, size: Size) -> Path:
        """The model as a runtime reads it."""
        key = (size.name, runtime.environment is OPENVINO)
        if key not in self._folders:
            self._tell(f"{size.name} for {runtime.name}")
            folder = model_folder(size, self._work)
            if runtime.environment is OPENVINO:
                folder = exported(
                    folder,
                    model_digest(size),
                    self._work / f"{size.name}-openvino",
                    self._pythons[OPENVINO],
                    may_export=not self._plan.is_quick,
                )
            self._folders[key] = folder
        return self._folders[key]

    def _draw(self, runtime: Runtime, size: Size, *, kind: str) -> None:
        """One process of one runtime: everything it can draw.

        Args:
            runtime: What draws.
            size: What is drawn.
            kind: ``first`` fills stores of compiled graphs, ``cold`` is without them,
                ``start`` draws one picture with no more loaded than that takes.
        """
        caches = self._caches(runtime, size)
        cases: dict[str, Any] = {NO_CACHE: None}
        if kind == "round":
            for name in caches:
                cases[name] = dict(described(cache_of(name, size), _calibration()))
        job = {
            "folder": str(self._folder(runtime, size)),
            "prompt": _PROMPT,
            "seed": 0,
            "side": size.side,
            "steps": size.steps,
            "first_steps": size.first_steps,
            "text_tokens": _TEXT_TOKENS,
            "repeats": size.repeats if kind == "round" else 0,
            "dtype": runtime.dtype,
            "cases": cases,
            "caches": ["none", *(caches if kind in ("first", "round") else _LOADED)],
            "is_compiled": runtime.is_compiled,
        }
        group = "cold" if kind == "cold" else size.name
        name = _name(runtime, kind)
        with tempfile.TemporaryDirectory() as fresh:
            stores = Path(fresh) if kind == "cold" else self._work / "compiled"
            job["compile_cache"] = str(stores / "openvino")
            variables = {"TORCHINDUCTOR_CACHE_DIR": str(stores / "inductor")}
            if kind == "cold":
                variables["MODULAR_CACHE_DIR"] = str(stores / "modular")
            try:
                found = self._run_worker(
                    runtime.worker,
                    job,
                    runtime.environment,
                    f"{name}, {size.name}",
                    variables,
                )
            except PeerError as err:
                self._found.refuse(group, name, err)
                return
        self._found.versions.setdefault(group, {})[runtime.label] = found["versions"]
        error = found["cases"][NO_CACHE].get("error")
        if error:
            self._found.refuse(group, name, error)
        elif kind == "cold":
            name, seconds = (
                "start to first picture, cold",
                found["first_picture_seconds"],
            )
            self._found.add("cold", name, "s", runtime.label, seconds)
        elif kind == "round":
            self._note(runtime, size, found)
        if not error and (
            kind == "start" or (kind == "round" and not self._starts_alone(runtime))
        ):
            self._note_start(runtime, size, found)

    def _note(self, runtime: Runtime, size: Size, found: Mapping[str, Any]) -> None:
        """What a process has printed."""
        for name, case in found["cases"].items():
            if "error" in case:
                self._found.refuse(size.name, f"{runtime.label}, {name}", case["error"])
                continue
            of = "" if name == NO_CACHE else f", {name}"
            self._add(size, f"picture{of}", "ms", runtime, case["picture_ms"])
            step = case["full_step_ms" if name == NO_CACHE else "cached_step_ms"]
            if step is not None:
                self._add(size, f"step{of}", "ms", runtime, step)
            if of:
                self._add(size, f"full steps{of}", "steps", runtime, case["full_steps"])

    def _note_start(
        self, runtime: Runtime, size: Size, found: Mapping[str, Any]
    ) -> None:
        """What a process took to start, and its memory."""
        for name, key, unit in (
            ("start to ready", "ready_seconds", "s"),
            ("start to first picture, warm", "first_picture_seconds", "s"),
            ("peak memory", "peak_mib", "MiB"),
        ):
            # A first picture of the large model is cut short.
            if size is DEMO or key != "first_picture_seconds":
                self._add(size, name, unit, runtime, found[key])

    def _measure_parts(self) -> None:
        """Forecasts alone, against MAX's own."""
        for _ in range(self._plan.rounds):
            for whose in ("ours", "theirs"):
                label = f"{OURS} float32" if whose == "ours" else "MAX's own float32"
                words = "TaylorSeerCache, " + label
                try:
                    found = self._run_worker(
                        "taylorseer.py", {"runtime": whose}, None, words, {}
                    )
                except PeerError as err:
                    self._found.refuse("parts", words, err)
                    continue
                for part, value in found.items():
                    name = f"TaylorSeer {part}"
                    self._found.add("parts", name, "ms", label, value)

    def _measure_skips(self) -> None:
        """Skipped steps at FLUX.1's width."""
        words = "skipped steps"
        for _ in range(self._plan.rounds):
            try:
                found = self._run_worker("skipped.py", {}, None, words, {})
            except PeerError as err:
                self._found.refuse("parts", words, err)
                return
            for name, values in found.items():
                for label, value in values.items():
                    self._found.add("parts", name, "ms", label, value)

    def _measure_starts(self) -> None:
        """Measures whole processes, from the shell to a PNG."""
        others = (r for r in self._runtimes if r.environment is OPENVINO)
        theirs = next(others, None)
        if theirs is not None and not self._prepare(theirs, DEMO):
            theirs = None
        job = StartJob(
            prompt=_PROMPT,
            side=DEMO.side,
            steps=50,
            text_tokens=_TEXT_TOKENS,
            folder=model_folder(DEMO, self._work),
            their_folder=None if theirs is None else self._folder(theirs, DEMO),
            their_python=None if theirs is None else self._pythons[OPENVINO],
            compiled=self._work / "compiled" / "openvino",
        )
        measure_starts(job, Collection())  # fills what is kept
        for _ in range(self._plan.rounds):
            self._tell("from the shell to a PNG")
            time.sleep(self._pause)
            measure_starts(job, self._found)
            self._done += PROCESSES

    def _add(
        self, size: Size, name: str, unit: str, runtime: Runtime, value: float
    ) -> None:
        self._found.add(size.name, name, unit, runtime.label, value)

    def _tell(self, words: str) -> None:
        if self._on_progress:
            self._on_progress(min(1.0, self._done / self._planned), words)

    def _run_worker(
        self,
        worker: str,
        job: Mapping[str, Any],
        own: Environment | None,
        words: str,
        variables: Mapping[str, str],
    ) -> dict[str, Any]:
        """One process; its last line is what it measured."""
        python = self._pythons[own] if own else Path(sys.executable)
        time.sleep(self._pause)
        told = json.dumps({**job, "started": time.time()})
        output = self._wait(
            [str(python), str(_WORKERS / worker), told], words, variables
        )
        self._done += 1
        try:
            found: dict[str, Any] = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError) as err:
            raise PeerError(f"it printed no result: {output[-200:]!r}") from err
        return found

    def _wait(self, line: list[str], words: str, variables: Mapping[str, str]) -> str:
        """Runs a process to its end and returns its output."""
        return output_of(
            line,
            variables=variables,
            limit_seconds=_LIMIT_SECONDS,
            on_wait=lambda: self._tell(words),
        )


def _name(runtime: Runtime, kind: str) -> str:
    """What a process is called."""
    words = {
        "first": ", before it is timed",
        "first start": ", before its start is timed",
        "start": ", its start",
        "cold": ", nothing compiled before",
    }
    return runtime.label + words.get(kind, "")


def cache_of(name: str, size: Size) -> AbstractCacheConfig:
    """The settings that all runtimes are given."""
    if name == "taylorseer":
        return TaylorSeerConfig(size.interval, size.warmup)
    return cache_from_options(name, size.caches[name])


def _calibration() -> Calibration:
    return Calibration.read(demo_model_path() / CALIBRATION_FILE)
