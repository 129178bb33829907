"""No cache: every step runs the full transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
from max.driver import Buffer

from ..calls import Routine
from .base import AbstractCacheState, AbstractStepCache, GraphGroup, Run, StateSizes
from .calibration import Calibration

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class NoCacheConfig:
    """Computes every step."""

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
