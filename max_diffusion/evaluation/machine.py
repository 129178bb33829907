"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from ..execution.targets import host_targets


def machine() -> dict[str, object]:
    """Describes this machine for reports.

    Returns:
        ``processor``; ``target``, the best that graphs are compiled for and this
        processor runs, ``None`` without one; ``cores`` that this process may use;
        ``memory_gib``; ``system``; ``python``, its version.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "target": next((host.name for host in host_targets()), None),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    """Returns the processor's name if the system tells; Linux has it in a file."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
