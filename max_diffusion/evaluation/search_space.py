"""What :func:`tune` tries of a method: settings far apart, and neighbours of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ..caches import CACHES, AbstractCacheConfig
from ..errors import RequestError


def tunable_caches() -> list[str]:
    """Names of the caches that say what to try of them."""
    return [name for name, kind in CACHES.items() if kind.ladders]


def coarse(method: str) -> list[AbstractCacheConfig]:
    """A method's settings far apart from each other.

    Raises:
        RequestError: No such method, or nothing to try of it.
    """
    if method not in tunable_caches():
        raise RequestError(
            f"tune: expected {', '.join(tunable_caches())}, got {method!r}"
        )
    ladders = CACHES[method].coarse
    return [
        CACHES[method](**dict(zip(ladders, values, strict=True)))
        for values in product(*ladders.values())
    ]


def neighbours(cache: AbstractCacheConfig) -> Iterator[AbstractCacheConfig]:
    """Settings one rung up or down on one of the method's ladders."""
    for option, ladder in cache.ladders.items():
        place = ladder.index(vars(cache)[option])
        for rung in (place - 1, place + 1):
            if 0 <= rung < len(ladder):
                found = replace(cache, **{option: ladder[rung]})
                if not found.is_repetition():
                    yield found
