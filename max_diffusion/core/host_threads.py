"""On how many CPUs this process computes, and how often its threads wake."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .control_groups import group_limits

_TASKS: Final = Path("/proc/self/task")
# What MAX 26.7 calls its workers.
_WORKER: Final = re.compile(r"\bThread\d+$")
# Of prctl(2).
_SET_TIMER_SLACK: Final = 29
_GET_TIMER_SLACK: Final = 30
_SLACK_NS: Final = 50_000_000


def usable_cpus() -> int:
    """Returns how many CPUs the process may run on at a time, at least 1.

    Those of its affinity; or, of a container that may only take the time of fewer,
    that many, rounded up.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, group_cpu_limit() or allowed)


def group_cpu_limit() -> int | None:
    """Returns how many CPUs' time the process's control group may take, rounded up.

    ``None`` without a limit.
    """
    return least_cpus(
        group_limits("cpu", "cpu.max", ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    )


def least_cpus(limits: Iterable[str]) -> int | None:
    """Returns the least of limits of the form ``QUOTA PERIOD``, in whole CPUs.

    ``None`` if there is none: a quota of ``max``, or of -1.
    """
    found = []
    for text in limits:
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(max(1, math.ceil(int(quota) / int(period))))
    return min(found, default=None)


def running_workers() -> int:
    """Returns how many worker threads MAX has started in this process.

    None before its first device; then as many as there were CPUs, to the end.
    """
    if sys.platform != "linux":
        return 0
    count = 0
    for task in _TASKS.iterdir():
        try:
            name = (task / "comm").read_text(encoding="utf-8").strip()
        except OSError:  # it has ended
            continue
        count += _WORKER.search(name) is not None
    return count


@contextmanager
def as_on_cpus(count: int) -> Iterator[None]:
    """Has what counts the CPUs meanwhile, to start as many threads, find ``count``.

    The threads may run on all of the process's CPUs afterwards: of several processes,
    none is tied to the same few. Linux only.
    """
    allowed = os.sched_getaffinity(0)
    before = _tasks()
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        for task in _tasks() - before:
            try:
                os.sched_setaffinity(task, allowed)
            except ProcessLookupError:  # it has ended
                continue


@contextmanager
def started_to_wake_late() -> Iterator[None]:
    """Has threads that are started meanwhile wake up to 50 ms after a wait has ended.

    What they wait for wakes them at once; only waits that end by themselves last
    longer. Linux only; elsewhere nothing changes.
    """
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    before = prctl(_GET_TIMER_SLACK)
    prctl(_SET_TIMER_SLACK, ctypes.c_ulong(_SLACK_NS))
    try:
        yield
    finally:
        prctl(_SET_TIMER_SLACK, ctypes.c_ulong(before))


def _tasks() -> set[int]:
    return {int(task.name) for task in _TASKS.iterdir()}
