"""How many bytes of memory this process may take, and a device has left."""

from __future__ import annotations

import os
from collections.abc import Iterable

from max.driver import Device

from .control_groups import group_limits


def host_memory() -> int:
    """Returns the machine's bytes of memory, or its control group's limit if lower."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(installed, group_memory_limit() or installed)


def free_memory(device: Device) -> int:
    """Returns the bytes that are free now of a device, or that its group may take.

    A host's are those that it would give up for them, too, such as files it has read.
    """
    if not device.is_host:
        return int(device.stats["free_memory"])
    import psutil  # of engines and LoRAs only

    free = int(psutil.virtual_memory().available)
    return min(free, group_memory_limit() or free)


def group_memory_limit() -> int | None:
    """Returns the most bytes that this process's control group may take.

    ``None`` without a limit.
    """
    return least_bytes(group_limits("memory", "memory.max", ("memory.limit_in_bytes",)))


def least_bytes(limits: Iterable[str]) -> int | None:
    """Returns the least of the limits of control groups; ``None`` if there is none."""
    known = [int(text) for text in limits if text.isdigit()]
    # Version 1 writes "no limit" as a number beyond any memory.
    return min((limit for limit in known if limit < 2**60), default=None)
