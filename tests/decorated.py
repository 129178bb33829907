"""Decorated functions to count and to step through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from max_diffusion.decorator import taylor_seer


def computed_steps(cached: Any, calls: int, *args: Any) -> list[int]:
    steps = []
    for step in range(calls):
        before = cached.cache_info().computed
        cached(*args)
        if cached.cache_info().computed > before:
            steps.append(step)
    return steps


def replaying(values: Sequence[Any], **settings: Any) -> tuple[Any, Callable[[], Any]]:
    """A decorated function, and a caller that steps through ``values``."""
    steps = iter(range(len(values)))
    now = 0

    @taylor_seer(**settings)
    def output():
        return values[now]

    def call():
        nonlocal now
        now = next(steps)
        return output()

    return output, call
