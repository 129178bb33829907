"""Decorated functions to count and to step through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from max_diffusion.decorator import taylor_seer


def computed_steps(cached: Any, calls: int, *args: Any) -> list[int]:
    steps = []
    for step in range(calls):
        before = cached.cache_info().computed
        cached(*args)
        if cached.cache_info().computed > before:
            steps.append(step)
    return steps


class Values(Protocol):
    """A list, or an array of any library."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def replaying(values: Values, **settings: Any) -> tuple[Any, Callable[[], Any]]:
    """A decorated function, and a caller that steps through ``values``."""
    steps = iter(range(len(values)))
    now = 0

    @taylor_seer(**settings)
    def output() -> Any:
        return values[now]

    def call() -> Any:
        nonlocal now
        now = next(steps)
        return output()

    return output, call
