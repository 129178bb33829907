"""cache-dit's step masks: which steps of a run a policy computes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from types import MappingProxyType
from typing import Final

POLICIES: Final = ("slow", "medium", "fast", "ultra")
"""Names of the policies, from the one that computes most to the one that computes
least."""

# Lengths of runs of steps, computed and skipped in turn, by number of steps and in the
# order of POLICIES. 28 is stretched and cut, 15 cut; cache-dit has none at 1, 2, 3, 5
# and 7 steps.
_FULL: Final = 28
_RUNS: Final[Mapping[int, tuple[tuple[int, ...], ...]]] = MappingProxyType(
    {
        4: ((2, 1, 1),) * 4,
        6: ((3, 2, 1),) * 4,
        8: ((5, 1, 2), (4, 1, 1, 1, 1), (3, 1, 1, 2, 1), (2, 2, 1, 2, 1)),
        9: ((5, 1, 3), (5, 1, 1, 1, 1), (4, 1, 1, 2, 1), (3, 2, 1, 2, 1)),
        15: (
            (4, 1, 2, 1, 2, 1, 2, 1, 1),
            (4, 1, 2, 1, 1, 2, 1, 2, 1),
            (3, 1, 1, 2, 1, 2, 1, 3, 1),
            (2, 1, 1, 2, 1, 3, 1, 3, 1),
        ),
        _FULL: (
            (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
            (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
            (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
            (4, 2, 1, 5, 1, 6, 1, 7, 1),
        ),
    }
)


def policy_steps(policy: str, num_steps: int) -> frozenset[int]:
    """Returns the steps that a policy computes in a run of ``num_steps``.

    Below 16 steps there are tables, up to 28 the mask of 28 steps is cut at its end,
    and above it is stretched, so that the share that is computed changes with the
    number of steps. Where cache-dit has no mask, at 1, 2, 3, 5 and 7 steps, all are
    computed.

    Args:
        policy: One of ``POLICIES``.
        num_steps: Number of steps of the run, at least 1.

    Returns:
        0-based steps; the first and the last are always among them.

    References:
        The masks are those of cache-dit 1.5's ``steps_mask``.
    """
    if num_steps < 8 and num_steps not in _RUNS:
        return frozenset(range(num_steps))
    table = next(size for size in _RUNS if size >= min(num_steps, _FULL))
    runs = list(_RUNS[table][POLICIES.index(policy)])
    _stretch(runs, num_steps)
    _cut(runs, num_steps)
    computed, step = {num_steps - 1}, 0
    for place, length in enumerate(runs):
        if place % 2 == 0:
            computed.update(range(step, step + length))
        step += length
    return frozenset(computed)


def _stretch(runs: list[int], num_steps: int) -> None:
    """Lengthens runs in turn, by half of their share of a longer run, until it fits."""
    share = num_steps / _FULL * 0.5
    # At least one step each; the last run, which is computed, grows step by step.
    more = [max(int(length * share), 1) for length in runs[:-1]] + [1]
    places = cycle(range(len(runs)))
    while sum(runs) < num_steps:
        place = next(places)
        runs[place] += more[place]


def _cut(runs: list[int], num_steps: int) -> None:
    """Shortens the last skipped and the last computed run in turn, until it fits."""
    is_skipped = True
    while sum(runs) > num_steps:
        place = max(
            place
            for place, length in enumerate(runs)
            if length and place % 2 == is_skipped
        )
        runs[place] -= 1
        is_skipped = not is_skipped
