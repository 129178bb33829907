"""What :func:`tune` tries: each method's options, and their values in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any, Final

from ..caches import CACHES, CacheConfig, cache_name
from ..errors import RequestError

Ladder = tuple[Any, ...]
_THRESHOLDS: Final = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56)
_LAST: Final = (0, 1, 2, 4)
_COEFFICIENTS: Final = ("finite_difference", "newton")

# From careful to bold, more or less: neighbours on a ladder are what is tried next.
KNOBS: Final[Mapping[str, Mapping[str, Ladder]]] = MappingProxyType(
    {
        "taylorseer": {
            "cache_interval": (2, 3, 4, 5, 6, 8, 10, 14),
            "warmup_steps": (16, 12, 9, 6, 4, 3, 2, 1),
            "max_order": (1, 2, 0),
            "compute_last": _LAST,
            "coefficients": _COEFFICIENTS,
        },
        "auto": {
            "tolerance": (0.005, *_THRESHOLDS),
            "warmup_steps": (8, 6, 4, 3, 2),
            "max_order": (1, 2),
            "max_interval": (4, 6, 8, 12, 16),
            "compute_last": _LAST,
            "coefficients": _COEFFICIENTS,
        },
        "step-mask": {
            "compute_steps": ("slow", "medium", "fast", "ultra"),
            "max_order": (1, 2, 0),
            "compute_last": _LAST,
        },
        "first-block": {
            "threshold": _THRESHOLDS,
            "warmup_steps": (12, 8, 4, 2, 0),
            "tail_order": (0, 1),
            "max_consecutive_cached": (2, 4, 8, 0),
            "compute_last": _LAST,
        },
        "magcache": {
            "threshold": _THRESHOLDS,
            "max_consecutive_cached": (2, 3, 4, 6, 8),
            "retention_ratio": (0.4, 0.3, 0.2, 0.1, 0.05),
            "compute_last": _LAST,
        },
        "teacache": {
            "threshold": (*_THRESHOLDS, 0.8),
            "compute_last": (1, 2, 4),
        },
        "pab": {
            "interval": (2, 3, 4, 6, 8),
            "compute_last": _LAST,
        },
        "fastercache": {
            "attention_interval": (2, 3, 4, 6, 8),
            "compute_last": _LAST,
        },
    }
)
# The two that say most, from which the search starts; others are at their defaults.
_COARSE: Final[Mapping[str, Mapping[str, Ladder]]] = MappingProxyType(
    {
        "taylorseer": {"cache_interval": (3, 5, 8), "warmup_steps": (9, 4)},
        "auto": {"tolerance": (0.02, 0.07, 0.2, 0.4)},
        "step-mask": {"compute_steps": KNOBS["step-mask"]["compute_steps"]},
        "first-block": {"threshold": (0.03, 0.1, 0.28), "tail_order": (0, 1)},
        "magcache": {"threshold": (0.05, 0.14, 0.4)},
        "teacache": {"threshold": (0.1, 0.28, 0.56)},
        "pab": {"interval": (2, 4)},
        "fastercache": {"attention_interval": (2, 4)},
    }
)


def coarse(method: str) -> list[CacheConfig]:
    """A method's settings far apart from each other.

    Raises:
        RequestError: No such method.
    """
    if method not in KNOBS:
        raise RequestError(f"tune: expected {', '.join(KNOBS)}, got {method!r}")
    ladders = _COARSE[method]
    return [
        CACHES[method](**dict(zip(ladders, values, strict=True)))
        for values in product(*ladders.values())
    ]


def neighbours(cache: CacheConfig) -> Iterator[CacheConfig]:
    """Settings one rung up or down on one of the ladders."""
    for knob, ladder in KNOBS[cache_name(cache)].items():
        place = ladder.index(vars(cache)[knob])
        for rung in (place - 1, place + 1):
            if 0 <= rung < len(ladder):
                found = replace(cache, **{knob: ladder[rung]})
                if not _is_repetition(found):
                    yield found


def _is_repetition(cache: CacheConfig) -> bool:
    """Up to order 1 all coefficients are the same."""
    options = vars(cache)
    return options.get("coefficients") == "newton" and options.get("max_order", 2) < 2
