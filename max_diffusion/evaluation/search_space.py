"""What a search tries of a method: settings far apart, and neighbours of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ..caches import CACHES, AbstractCacheConfig
from ..errors import RequestError


def tunable_caches() -> list[str]:
    """Returns the names of the caches that can be tuned: those with ladders."""
    return [name for name, kind in CACHES.items() if kind.ladders]


def coarse(method: str) -> list[AbstractCacheConfig]:
    """Returns a method's settings far apart, from which a search starts.

    Args:
        method: Name of a cache. Of its coarse values every combination is taken that
            its configuration does not refuse.

    Raises:
        RequestError: No such method, nothing to try of it, or all is refused.
    """
    if method not in tunable_caches():
        raise RequestError(
            f"tune: expected {', '.join(tunable_caches())}, without options, got "
            f"{method!r:.80}; leave it out for all"
        )
    ladders = CACHES[method].coarse
    found: list[AbstractCacheConfig] = []
    refused: RequestError | None = None
    for values in product(*ladders.values()):
        try:
            found.append(CACHES[method](**dict(zip(ladders, values, strict=True))))
        except RequestError as err:
            refused = err
    if refused is not None and not found:
        raise refused
    return found


def neighbours(cache: AbstractCacheConfig) -> Iterator[AbstractCacheConfig]:
    """Yields the settings one rung up or down on one of the method's ladders.

    Those that the cache's configuration refuses, because options do not go together,
    are left out, and so are repetitions of others.

    Args:
        cache: A setting whose options are on the ladders.
    """
    for option, ladder in cache.ladders.items():
        place = ladder.index(vars(cache)[option])
        for rung in (place - 1, place + 1):
            if 0 <= rung < len(ladder):
                try:
                    found = replace(cache, **{option: ladder[rung]})
                except RequestError:
                    continue
                if not found.is_repetition():
                    yield found
