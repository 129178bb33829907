"""Which groups a benchmark measures, in which form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from max_diffusion.core.validation import one_of, whole
from max_diffusion.errors import RequestError

from .models import DEMO, LARGE, Size

GROUPS: Final = (DEMO.name, LARGE.name, "start", "cold", "parts")
"""What can be measured by itself: the models, from shell to PNG and what that time goes
into, first pictures without any cache in float32, and parts."""
QUICK_GROUPS: Final = (DEMO.name, "parts")
"""Those of them that the quick form has."""
ROUNDS: Final = 3
"""Processes of each runtime, unless asked otherwise."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    is_quick: bool
    """Whether it is the quick form: one round, float32, nothing installed."""
    groups: tuple[str, ...]
    """Groups of :data:`GROUPS`, in its order."""
    rounds: int
    """Processes of each runtime."""
    command: str
    """The command that measures the same."""

    @classmethod
    def of(cls, *, is_quick: bool, groups: Sequence[str], rounds: int) -> Plan:
        """Checks what is asked for.

        Args:
            is_quick: Whether the quick form is.
            groups: Names of groups; :data:`GROUPS` itself is all that the form has.
            rounds: Processes of each runtime; the quick form has one.

        Raises:
            RequestError: ``rounds`` is out of range, there is no such group, or the
                quick form does not have it.
        """
        for name in groups:
            one_of("bench: a group", name, GROUPS)
        whole("bench: rounds", rounds, minimum=1, maximum=100)
        possible = QUICK_GROUPS if is_quick else GROUPS
        left_out = [name for name in groups if name not in possible]
        if left_out and groups is not GROUPS:
            raise RequestError(
                f"bench: the quick form has {', '.join(possible)}, not "
                f"{', '.join(left_out)}; leave one or the other out"
            )
        command = "scripts/bench" + (" --quick" if is_quick else "")
        if groups is not GROUPS:
            command += f" --only {','.join(groups)}"
        if not is_quick and rounds != ROUNDS:
            command += f" --rounds {rounds}"
        wanted = tuple(name for name in possible if name in groups)
        return cls(is_quick, wanted, 1 if is_quick else rounds, command)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The models to draw with."""
        return tuple(size for size in (DEMO, LARGE) if size.name in self.groups)
