"""Runs the parts of the check in turn, one process each, and collects their figures."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.harness.artefact_cache import digest, made_once
from benchmarks.harness.measures import Collection
from benchmarks.harness.runtimes import OURS, PeerError
from benchmarks.harness.worker_process import output_of
from max_diffusion.core.files import prepared_folder
from max_diffusion.errors import DeviceError
from max_diffusion.evaluation.drawing import OnProgress
from max_diffusion.evaluation.machine import machine
from max_diffusion.pipelines.opening import demo_model_path

from .device_memory import watched
from .gpu_tests import ROOT, TestsResult, run_tests
from .plan import PARTS, GpuPlan, GpuResult
from .sizes import FULL
from .step_inputs import write_step_inputs

_ROLES: Final = ("transformer", "text_encoder", "text_encoder_2", "vae")
_PROMPT: Final = "a red circle above a blue square"
_LIMIT_SECONDS: Final = 7200.0  # of a process
_FACTOR: Final = 1.5
"""How many times torch's own error in the same dtype ours may be."""
_FULL_GIB: Final = 33.0
_CUT_GIB: Final = 3.0
_DEVICE_KEYS: Final = ("name", "api", "architecture", "targets", "stats")


def gpu_check(
    plan: GpuPlan, work: Path, on_progress: OnProgress | None = None
) -> GpuResult:
    """Checks what only a GPU can tell, beside diffusers on the same GPU.

    Each runtime is a process of its own, in turn, all with the same random weights. No
    process begins when the plan's minutes are over.

    Args:
        plan: What is checked.
        work: Folder in which the random models are kept.
        on_progress: See :data:`OnProgress`; what it raises ends the check.

    Raises:
        DeviceError: MAX sees no such device.
        RequestError: The plan cannot be run.
    """
    plan.check()
    with tempfile.TemporaryDirectory(dir=prepared_folder(work)) as scratch:
        return _Check(plan, work, Path(scratch), on_progress).run()


class _TimeOver(Exception):
    """The plan's minutes are over."""


@dataclass
class _Check:
    """The check as it goes on."""

    plan: GpuPlan
    work: Path
    scratch: Path
    on_progress: OnProgress | None
    found: Collection = field(default_factory=Collection)
    failures: list[str] = field(default_factory=list)
    tests: TestsResult | None = None
    started: float = field(default_factory=lambda: time.perf_counter())

    def run(self) -> GpuResult:
        """Every part, as long as there is time."""
        try:
            device = self._process("device", "ours", "device", {})
        except PeerError as err:
            raise DeviceError(
                f"gpu_check: MAX cannot use {self.plan.device}: {err}"
            ) from err
        begun = []
        works = {
            "tests": self._run_tests,
            "parity": self._check_parity,
            "step": self._measure_steps,
            "picture": self._measure_pictures,
            "memory": self._measure_memory,
        }
        for part in PARTS:
            if part not in self.plan.parts:
                continue
            try:
                self._check_time()
                begun.append(part)
                works[part]()
            except _TimeOver:
                words = f"the {self.plan.minutes:g} minutes were over"
                self.found.refuse(part, "the rest", words)
            except PeerError as err:
                self.found.refuse(part, "all of it", err)
                self.failures.append(f"{part}: {err}")
        return GpuResult(
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            command=self.plan.command,
            size=self.plan.size.title,
            parts=tuple(begun),
            device={k: v for k, v in device.items() if k in _DEVICE_KEYS},
            machine=machine(),
            versions=self.found.versions.get("all", {}),
            measures=tuple(self.found.measures.values()),
            tests=self.tests,
            failures=tuple(self.failures),
            not_run=self.found.not_run,
            seconds=time.perf_counter() - self.started,
        )

    def _run_tests(self) -> None:
        self.tests = run_tests(
            self.plan.tests,
            self.plan.device,
            report=self.scratch / "tests.xml",
            precompiled=self.plan.precompiled,
            limit_seconds=_LIMIT_SECONDS,
            on_wait=lambda: self._tell("tests", "tests on the GPU"),
        )
        self.failures += [
            f"tests: {name}: {words}" for name, words in self.tests.failed.items()
        ]

    def _check_parity(self) -> None:
        """A few blocks of full width, against the same in float32."""
        cut = self.plan.size.cut
        folder = self._folder(cut, ("transformer",) if cut else _ROLES)
        job = self._step_job(folder) | {"repeats": 1}
        exact = {"dtype": "float32", "is_compiled": False}
        self._process("parity", "theirs", "step", job | exact, "reference")
        reference = self._output("parity", "reference")
        assert reference is not None
        errors = {}
        for label, worker, words in self._two():
            try:
                self._process("parity", worker, "step", job | words, label)
            except PeerError as err:
                self._refuse("parity", label, err)
                continue
            got = self._output("parity", label)
            assert got is not None
            errors[label] = self._compare("parity", "to float32", label, got, reference)
        ours, theirs = (errors.get(label) for label, *_ in self._two())
        # Two roundings of the same sum in float32 differ by that much.
        least = 1e-4
        if ours is not None and theirs is not None:
            limit = max(least, _FACTOR * theirs)
            if not ours <= limit:
                self.failures.append(
                    f"parity: a step must be within {limit:.2g} of float32's, which is "
                    f"{_FACTOR} times {self.plan.peer}'s error, got {ours:.2g}"
                )

    def _measure_steps(self) -> None:
        folder = self._folder({}, _ROLES)
        job = self._step_job(folder) | {"repeats": self.plan.size.step_repeats}
        for turn in range(self.plan.rounds):
            # Another comes first in each round.
            for label, worker, words in self._two()[:: -1 if turn % 2 else 1]:
                try:
                    got = self._process("step", worker, "step", job | words, label)
                except PeerError as err:
                    self._refuse("step", label, err)
                    continue
                self.found.add("step", "step", "ms", label, _median(got["step_ms"]))
                self._note_start("step", label, got, turn)
        ours, theirs = (self._output("step", label) for label, *_ in self._two())
        if ours is not None and theirs is not None:
            to = f"to {self.plan.peer}"
            self._compare("step", to, self._label(OURS), ours, theirs)

    def _measure_pictures(self) -> None:
        job = self._picture_job() | {"first_steps": 2, "repeats": 1}
        ours, theirs = self._two()
        runs = [(*ours, ["none", "taylorseer"])]
        if not self.plan.is_eager:  # which has no caches
            runs.append((*theirs, ["none"]))
        eager = self._label("diffusers eager"), "theirs", {"is_compiled": False}
        runs.append((*eager, ["none", "taylorseer"]))
        for turn in range(self.plan.rounds):
            at = turn % len(runs)  # another comes first in each round
            for label, worker, words, cases in (*runs[at:], *runs[:at]):
                own = job | words | {"cases": cases}
                try:
                    got = self._process("picture", worker, "picture", own, label)
                except PeerError as err:
                    self._refuse("picture", label, err)
                    continue
                self._note_pictures(label, got)
                self._note_start("picture", label, got, turn)
        for case in ("none", "taylorseer"):
            mine = self._output("picture", self._label(OURS), case)
            for label, *_ in runs[1:]:
                other = self._output("picture", label, case)
                if mine is not None and other is not None:
                    name = f"PSNR to ours{_of(case)}"
                    value = _psnr(mine, other, 255.0)
                    self.found.add("picture", name, "dB", label, value)

    def _measure_memory(self) -> None:
        steps = min(4, self.plan.size.steps)
        job = self._picture_job() | {"first_steps": steps, "repeats": 0}
        for label, worker, words in self._two():
            own = job | words | {"cases": ["none"]}
            try:
                with watched(self.plan.device) as peak:
                    got = self._process("memory", worker, "picture", own, label)
            except PeerError as err:
                self._refuse("memory", label, err)
                continue
            self.found.add("memory", "host, at most", "MiB", label, got["host_mib"])
            if peak.mib is not None:
                self.found.add("memory", "GPU, at most", "MiB", label, peak.mib)
            elif self.plan.device != "cpu":
                self.found.refuse("memory", f"{label}, GPU", "nvidia-smi told nothing")
            if "allocated_mib" in got:
                name = "GPU, allocated and not only reserved, at most"
                self.found.add("memory", name, "MiB", label, got["allocated_mib"])

    def _note_pictures(self, label: str, got: Mapping[str, Any]) -> None:
        for case, values in got["cases"].items():
            took, full = _median(values["picture_ms"]), values["full_steps"]
            self.found.add("picture", f"picture{_of(case)}", "ms", label, took)
            self.found.add("picture", f"full steps{_of(case)}", "steps", label, full)

    def _note_start(
        self, part: str, label: str, got: Mapping[str, Any], turn: int
    ) -> None:
        """What came before: the first process of a part finds nothing compiled."""
        self.found.add(part, "load", "s", label, got["load_seconds"])
        if "compile_seconds" in got:
            name = "compile" if turn == 0 else "compile, kept on disk"
            self.found.add(part, name, "s", label, got["compile_seconds"])
        elif "first_seconds" in got:
            name = "first picture" if part == "picture" else "first step"
            name += "" if turn == 0 else ", kept on disk"
            self.found.add(part, name, "s", label, got["first_seconds"])

    def _compare(
        self, part: str, words: str, label: str, got: np.ndarray, wanted: np.ndarray
    ) -> float:
        """Adds the relative error and the PSNR; returns the former."""
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        self.found.add(part, f"error {words}", "%", label, 100 * error)
        peak = float(wanted.max() - wanted.min())
        self.found.add(part, f"PSNR {words}", "dB", label, _psnr(got, wanted, peak))
        return error

    def _two(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Ours and what it is measured against: label, worker, words for its job."""
        return [
            (self._label(OURS), "ours", {}),
            (
                self._label(self.plan.peer),
                "theirs",
                {"is_compiled": not self.plan.is_eager},
            ),
        ]

    def _label(self, name: str) -> str:
        return f"{name} {self.plan.dtype}"

    def _step_job(self, folder: Path) -> dict[str, Any]:
        inputs = self.scratch / f"{folder.name}.npz"
        config = json.loads((folder / "transformer" / "config.json").read_text())
        write_step_inputs(inputs, self.plan.size, config)
        return {"folder": str(folder), "inputs": str(inputs)}

    def _picture_job(self) -> dict[str, Any]:
        size = self.plan.size
        return {
            "folder": str(self._folder({}, _ROLES)),
            "prompt": _PROMPT,
            "side": size.side,
            "steps": size.steps,
            "text_tokens": size.text_tokens,
            "interval": size.interval,
            "warmup": size.warmup,
        }

    def _folder(self, cut: Mapping[str, int], roles: Sequence[str]) -> Path:
        """A model of random weights, written once."""
        size = self.plan.size
        configs = {role: dict(size.configs.get(role, {})) for role in roles}
        configs["transformer"] |= cut
        job = {
            "roles": roles,
            "configs": configs,
            "tokens": {"tokenizer": size.clip_tokens, "tokenizer_2": size.text_tokens},
        }
        name = f"gpu-{size.name}" + ("" if len(roles) > 1 else "-cut")
        of = digest([json.dumps(job), demo_model_path()])
        return made_once(self.work / name, of, lambda path: self._write(path, job))

    def _write(self, folder: Path, job: Mapping[str, Any]) -> None:
        free = shutil.disk_usage(folder).free / 2**30
        needed = _FULL_GIB if len(job["roles"]) > 1 else _CUT_GIB
        if self.plan.size is FULL and free < needed:
            raise PeerError(
                f"the model takes {needed:.0f} GiB, but {self.work} has {free:.0f} "
                "left; give another folder by --work"
            )
        self._process("model", "folder", "write", {**job, "folder": str(folder)})

    def _process(
        self,
        part: str,
        worker: str,
        what: str,
        job: Mapping[str, Any],
        label: str | None = None,
    ) -> dict[str, Any]:
        """One process; its last line is what it measured."""
        if part != "device":
            self._check_time()
        full = {
            "what": what,
            "device": self.plan.device,
            "dtype": self.plan.dtype,
            "precompiled": [str(path) for path in self.plan.precompiled],
            "output": str(self.scratch / _file_name(part, label or "")),
            **job,
        }
        output = output_of(
            [sys.executable, "-m", f"benchmarks.gpu.{worker}", json.dumps(full)],
            variables={
                "PYTHONPATH": str(ROOT),
                "MODULAR_CACHE_DIR": str(self.scratch / "modular"),
                "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
            },
            limit_seconds=_LIMIT_SECONDS,
            on_wait=lambda: self._tell(part, f"{part}, {label or worker}"),
        )
        try:
            found: dict[str, Any] = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError) as err:
            raise PeerError(f"it printed no result: {output[-200:]!r}") from err
        if label and "versions" in found:
            self.found.versions.setdefault("all", {})[label] = found["versions"]
        return found

    def _output(self, part: str, label: str, case: str = "step") -> np.ndarray | None:
        """What a runtime computed, if it did."""
        path = self.scratch / f"{_file_name(part, label)}-{case}.npy"
        return np.load(path) if path.is_file() else None

    def _refuse(self, part: str, label: str, err: PeerError) -> None:
        self.found.refuse(part, label, err)
        if label.startswith(OURS):
            self.failures.append(f"{part}: {label}: {err}")

    def _check_time(self) -> None:
        if time.perf_counter() - self.started > 60 * self.plan.minutes:
            raise _TimeOver

    def _tell(self, part: str, words: str) -> None:
        if self.on_progress:
            known = [name for name in PARTS if name in self.plan.parts]
            done = known.index(part) if part in known else 0
            self.on_progress(done / len(known), words)


def _file_name(part: str, label: str) -> str:
    return f"{part}-{label}".replace(" ", "-")


def _of(case: str) -> str:
    return "" if case == "none" else f", {case}"


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _psnr(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """Peak signal to noise ratio, dB; 200 where nothing differs, which JSON has."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return min(200.0, 10 * math.log10(peak**2 / error)) if error else 200.0
