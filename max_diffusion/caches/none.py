"""No cache: every step runs the full transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from max.driver import Buffer

from ..execution.graph_call import Routine
from .calibration import Calibration
from .config import AbstractCacheConfig, ChartStyle, GraphGroup, StateSizes
from .kinds import AbstractCacheState, AbstractStepCache, Run


@dataclass(frozen=True)
class NoCacheConfig(AbstractCacheConfig):
    """The configuration without options whose cache computes every step."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = (
        "Computes every step in full: the slowest, and what the others are measured by."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#1d2433", "o")
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("full",)

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns 0: a request keeps no state."""
        return 0

    def create_cache(self, calibration: Calibration) -> NoCache:
        """Creates the policy; needs no calibration."""
        return NoCache()


@final
@dataclass
class NoCacheState(AbstractCacheState):
    """The empty state of a policy that remembers nothing."""

    def restart(self, batch: int) -> None:
        """Does nothing, because there is nothing to forget."""

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that the state holds: always 0."""
        return 0


@final
class NoCache(AbstractStepCache):
    """The policy that computes every step."""

    def create_state(self, run: Run) -> NoCacheState:
        """Creates an empty state."""
        return NoCacheState()

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns no steps: all are computed."""
        return frozenset()

    def decide(
        self, state: AbstractCacheState, step: int, batch: int
    ) -> Sequence[bool]:
        """Returns True for all samples."""
        return [True] * batch

    def forecast(self, state: AbstractCacheState, step: int) -> Routine[Buffer]:
        """Raises AssertionError: every step computes, so nothing is forecast."""
        raise AssertionError("a cache that computes every step has nothing to forecast")

    def remember(
        self,
        state: AbstractCacheState,
        noise_pred: Buffer,
        step: int,
        rows: Sequence[int] | None = None,
    ) -> Routine[None]:
        """Keeps nothing of the prediction."""
        yield from ()
