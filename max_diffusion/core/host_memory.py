"""How many bytes of memory this process may take, and a device has left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from max.driver import Device

_GROUPS: Final = Path("/proc/self/cgroup")
_ROOT: Final = Path("/sys/fs/cgroup")


def host_memory() -> int:
    """Returns the machine's bytes of memory, or its control group's limit if lower."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(installed, group_memory_limit() or installed)


def free_memory(device: Device) -> int:
    """Returns the bytes that are free now of a device, or that its group may take."""
    if not device.is_host:
        return int(device.stats["free_memory"])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free, group_memory_limit() or free)


def group_memory_limit(groups: Path = _GROUPS, root: Path = _ROOT) -> int | None:
    """Returns the most bytes that this process's control group may take.

    ``None`` without a limit.

    Args:
        groups: File in which Linux lists the process's groups.
        root: Folder that the groups' files are in.
    """
    limits = []
    try:
        lines = groups.read_text(encoding="utf-8").split("\n")
    except OSError:  # not Linux
        return None
    for line in filter(None, lines):
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            place, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            place, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = place / name.lstrip("/")
        # In a container the name may be the host's, and the root this group itself.
        for folder in (group, *group.parents):
            if (folder / file).is_file():
                text = (folder / file).read_text(encoding="utf-8").strip()
                limits += [int(text)] if text.isdigit() else []
            if folder == place:
                break
    # Version 1 writes "no limit" as a number beyond any memory.
    limits = [limit for limit in limits if limit < 2**60]
    return min(limits, default=None)
