"""What all workers do alike. Peers' own Pythons run this: the standard library only."""

from __future__ import annotations

import json
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Picture:
    """One image: how long all of it took, and each step but the first.

    The first step is left out because not every runtime tells when it began.
    """

    seconds: float
    """Seconds that the whole image took."""
    milliseconds: Sequence[float]
    """Milliseconds of each step but the first."""
    is_full: Sequence[bool]
    """Whether each step, the first too, ran the whole transformer."""


Draw = Callable[[dict[str, Any] | None, int], Picture]
"""Draws with a cache, described by its settings, or with none, in so many steps."""


def job() -> dict[str, Any]:
    """What this process is to do."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def work(draw: Draw, packages: Sequence[str], ready: float) -> None:
    """Draws every case and prints what was measured, as JSON on the last line.

    Args:
        draw: Draws one picture.
        packages: Distributions whose versions are told.
        ready: When it could draw, ``time.time()``; the job says when it was started.
    """
    wanted = job()
    result: dict[str, Any] = {
        "versions": {name: version(name) for name in packages},
        "ready_seconds": ready - wanted["started"],
        "cases": {},
    }
    for name, cache in wanted["cases"].items():
        try:
            # The first is not timed: compiles, allocations.
            draw(cache, wanted["first_steps"])
            if "first_picture_seconds" not in result:
                result["first_picture_seconds"] = time.time() - wanted["started"]
            pictures = [draw(cache, wanted["steps"]) for _ in range(wanted["repeats"])]
        except Exception as err:
            words = " ".join(str(err).split()) or type(err).__name__
            result["cases"][name] = {"error": words[:300]}
            continue
        result["cases"][name] = summary(pictures)
        # Of the first case, so that it is that of no cache.
        result.setdefault("peak_mib", peak_mib())
    print(json.dumps(result))


def summary(pictures: Sequence[Picture]) -> dict[str, float | None]:
    """Medians, in milliseconds, and how many steps were computed in full."""
    if not pictures:
        return {}
    steps = [
        pair
        for picture in pictures
        for pair in zip(picture.milliseconds, picture.is_full[1:], strict=True)
    ]
    full = [ms for ms, is_full in steps if is_full]
    cached = [ms for ms, is_full in steps if not is_full]
    return {
        "picture_ms": 1e3 * statistics.median(p.seconds for p in pictures),
        "full_step_ms": statistics.median(full) if full else None,
        "cached_step_ms": statistics.median(cached) if cached else None,
        "full_steps": sum(pictures[0].is_full),
    }


def peak_mib() -> float:
    """Most memory this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its figure starts at what the parent held.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
