"""No cache: every step runs the full transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from max.driver import Buffer

from ..execution.graph_call import Routine
from .calibration import Calibration
from .config import AbstractCacheConfig, ChartStyle, GraphGroup, StateSizes
from .kinds import AbstractCacheState, AbstractStepCache, Run


@dataclass(frozen=True)
class NoCacheConfig(AbstractCacheConfig):
    """Computes every step."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = (
        "Computes every step in full: the slowest, and what the others are measured by."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#1d2433", "o")
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("full",)

    def state_bytes(self, sizes: StateSizes) -> int:
        """Most bytes of state that a request holds, of all branches."""
        return 0

    def create_cache(self, calibration: Calibration) -> NoCache:
        """The policy."""
        return NoCache()


@final
@dataclass
class NoCacheState(AbstractCacheState):
    """Nothing to remember."""

    def restart(self, batch: int) -> None:
        """Has nothing to forget."""

    @property
    def num_bytes(self) -> int:
        """Always 0."""
        return 0


@final
class NoCache(AbstractStepCache):
    """The policy that never skips."""

    def create_state(self, run: Run) -> NoCacheState:
        """An empty state."""
        return NoCacheState()

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """None."""
        return frozenset()

    def decide(self, state: AbstractCacheState, step: int, batch: int) -> np.ndarray:
        """All of them."""
        return np.ones(batch, bool)

    def forecast(self, state: AbstractCacheState, step: int) -> Routine[Buffer]:
        """Never reached: every step computes."""
        raise AssertionError("a cache that computes every step has nothing to forecast")

    def remember(
        self,
        state: AbstractCacheState,
        noise_pred: Buffer,
        step: int,
        rows: Sequence[int] | None = None,
    ) -> Routine[None]:
        """Keeps nothing."""
        yield from ()
