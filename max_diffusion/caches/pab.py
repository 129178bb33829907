"""Pyramid Attention Broadcast: reuse attention while attention changes least."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

from ..core.validation import count, ordered
from .calibration import Calibration
from .config import ChartStyle, GraphGroup, Ladders, StateSizes
from .history import History
from .kinds import AbstractModuleCache, ModuleState, Run
from .rules import StepRules


@dataclass(frozen=True)
class PabConfig(StepRules):
    """Options of Pyramid Attention Broadcast, beside those of :class:`StepRules`.

    Attributes:
        interval: Within the range, steps whose index is a multiple of this compute.
        min_timestep: Lower end of the range that reuses, 1000 at pure noise; excluded.
        max_timestep: Upper end of that range, excluded.
    """

    name: ClassVar[str] = "pab"
    summary: ClassVar[str] = (
        "Runs every block, often with the attention of an earlier step. Made for video."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#1f9eb0", "D")
    ladders: ClassVar[Ladders] = MappingProxyType(
        {
            "interval": (2, 3, 4, 6, 8),
            "compute_last": (0, 1, 2, 4),
        }
    )
    coarse: ClassVar[Ladders] = MappingProxyType({"interval": (2, 4)})
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("attention", "series")

    interval: int = 2
    min_timestep: float = 100.0
    max_timestep: float = 800.0

    def __post_init__(self) -> None:
        """Checks the range of each option."""
        super().__post_init__()
        count("pab: interval", self.interval, minimum=1)
        ordered("pab", self.min_timestep, self.max_timestep)

    def reused_steps(self, timesteps: tuple[float, ...]) -> frozenset[int]:
        """Returns the steps within the range that ``interval`` does not divide."""
        return frozenset(
            step
            for step, timestep in enumerate(timesteps)
            if self.min_timestep < timestep < self.max_timestep and step % self.interval
        )

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of state that a request holds, over all branches."""
        return sizes.branches * sizes.modules["attention"]

    def create_cache(self, calibration: Calibration) -> Pab:
        """Creates the policy; needs no calibration."""
        return Pab(self)


@final
class Pab(AbstractModuleCache):
    """Gives blocks the attention of the last computed step; all else runs.

    References:
        Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast",
        2024, arXiv:2408.12588; the rule is that of diffusers 0.42. Differs: guidance
        branches never share an attention, as they do there when they run in turn.
    """

    level = "attention"

    def __init__(self, config: PabConfig) -> None:
        self.config = config

    def create_state(self, run: Run) -> ModuleState:
        """Creates a branch's state: the plan of the run, and no attention yet."""
        return ModuleState(self.config.reused_steps(run.timesteps_for("pab")))

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps that the plan reuses, but for the first."""
        return self.create_state(run).plan & run.later_steps

    def create_memory(self) -> History:
        """Creates the memory of a module's last output."""
        return History(0, "finite_difference")

    def decide(self, state: ModuleState, step: int) -> bool:
        """Returns whether the plan computes the step's attention."""
        return step not in state.plan
