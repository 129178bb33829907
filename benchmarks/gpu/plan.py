"""What is checked, and what comes of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from max.driver import accelerator_count

from benchmarks.harness.measures import Measure
from max_diffusion.core.report import plain
from max_diffusion.core.validation import one_of, whole
from max_diffusion.errors import DeviceError, RequestError

from .gpu_tests import GPU_TESTS, TestsResult
from .sizes import FULL, GpuSize

PARTS: Final = ("tests", "parity", "step", "picture", "memory")
"""What can be asked for by itself, in this order."""
ROUNDS: Final = 3
"""Processes of each runtime, unless asked otherwise."""


@dataclass(frozen=True)
class GpuPlan:
    """What is checked, and how."""

    size: GpuSize = FULL
    device: str = "gpu"
    parts: Sequence[str] = PARTS
    rounds: int = ROUNDS
    minutes: float = math.inf
    """After which nothing more is begun."""
    is_eager: bool = False
    """Whether diffusers runs without ``torch.compile``."""
    precompiled: Sequence[Path] = ()
    """Folders of ``max-diffusion compile``."""
    command: str = "scripts/gpu_check"
    """The command that checks the same."""
    tests: Sequence[Path] = GPU_TESTS

    def check(self) -> None:
        """Refuses what cannot be run.

        Raises:
            DeviceError: MAX sees no such device.
            RequestError: A value is out of range.
        """
        for name in self.parts:
            one_of("gpu_check: a part", name, PARTS)
        whole("gpu_check: rounds", self.rounds, minimum=1, maximum=100)
        if not self.minutes > 0:
            raise RequestError(
                f"gpu_check: minutes must be above 0, got {self.minutes:g}"
            )
        if not re.fullmatch(r"cpu|gpu(:\d+)?", self.device):
            raise RequestError(
                f"gpu_check: device must be cpu, gpu or gpu:INDEX, got {self.device!r}"
            )
        # Not by making the device: this process would hold some of its memory.
        found, index = accelerator_count(), int(self.device.partition(":")[2] or 0)
        if self.device != "cpu" and found == 0:
            raise DeviceError(
                "gpu_check: MAX sees no GPU here; run it on a machine with one, or try "
                "its code by --size tiny --device cpu"
            )
        if index >= max(found, 1):
            raise DeviceError(
                f"gpu_check: {self.device} asked for, but MAX sees {found} GPUs here; "
                f"use gpu:0 to gpu:{found - 1}"
            )

    @property
    def dtype(self) -> str:
        """What is computed in: what users get on that device."""
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def peer(self) -> str:
        """What steps are measured against."""
        return "diffusers eager" if self.is_eager else "torch.compile"


@dataclass(frozen=True)
class GpuResult:
    """What was found."""

    date: str
    """The day, in UTC: ``2026-01-31``."""
    command: str
    size: str
    """Words for the model."""
    parts: tuple[str, ...]
    """Those that were begun."""
    device: Mapping[str, Any]
    """What MAX says of the GPU."""
    machine: Mapping[str, object]
    versions: Mapping[str, Mapping[str, str]]
    """Versions of packages by runtime and package."""
    measures: tuple[Measure, ...]
    """All figures; their group is the part."""
    tests: TestsResult | None
    """``None`` if they were not run."""
    failures: tuple[str, ...]
    """What is not as it should be, a line each."""
    not_run: Mapping[str, Mapping[str, str]]
    """Why something could not be run, by part and name."""
    seconds: float
    """Seconds that all of it took."""

    def to_dict(self) -> dict[str, Any]:
        """The result in plain JSON types."""
        found: dict[str, Any] = plain(vars(self))
        for item, measure in zip(found["measures"], self.measures, strict=True):
            item["medians"] = plain(measure.medians)
        return found
