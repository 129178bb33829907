"""How much of a GPU's memory is taken while something else runs."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_INTERVAL_MS = 100


@dataclass
class Peak:
    """What was seen; filled at the end."""

    mib: float | None = None
    """The most that was taken beyond what was at the start; ``None`` if unknown."""


@contextmanager
def watched(device: str) -> Iterator[Peak]:
    """Asks the driver ten times a second, by a process beside the one measured.

    It tells what is taken of the whole GPU, also what a runtime reserves and does not
    use. Without ``nvidia-smi``, and of a CPU, nothing is known.

    Args:
        device: ``cpu``, ``gpu`` or ``gpu:INDEX``.
    """
    peak = Peak()
    with tempfile.TemporaryFile("w+") as output:
        process = None if device == "cpu" else _started(device, output.fileno())
        try:
            yield peak
        finally:
            if process is not None:
                process.kill()
                process.wait()
        output.seek(0)
        values = [float(line) for line in output.read().split() if line.isdecimal()]
    if len(values) > 1:
        peak.mib = max(values) - values[0]


def _started(device: str, output: int) -> subprocess.Popen[bytes] | None:
    index = int(device.partition(":")[2] or 0)
    visible = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    line = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    line += ["-i", visible[index] if index < len(visible) else str(index)]
    line += ["-lms", str(_INTERVAL_MS)]
    try:
        return subprocess.Popen(line, stdout=output, stderr=subprocess.DEVNULL)
    except OSError:
        return None
