"""TaylorSeer: forecast the prediction, or what modules give, from computed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, final

from ..core.validation import count, one_of
from .calibration import Calibration
from .config import ChartStyle, GraphGroup, Ladders, StateSizes
from .history import MAX_ORDER, History
from .kinds import AbstractCacheState, AbstractModuleCache, ModuleState, Run
from .rules import StepRules
from .series import COEFFICIENTS, checked_coefficients
from .series_cache import SeriesCache, SeriesState, history_of

PHASES: Final = ("documented", "official", "absolute")
# What runs the steps that forecast each target.
_GROUPS: Final[Mapping[str, GraphGroup]] = MappingProxyType(
    {"prediction": "full", "attention": "attention", "modules": "modules"}
)


@dataclass(frozen=True)
class TaylorSeerConfig(StepRules):
    """Options of TaylorSeer, beside those of :class:`StepRules`.

    Attributes:
        cache_interval: A step in this many is computed after the warm-up; 1 computes
            all.
        warmup_steps: Steps at the start that always compute.
        max_order: Highest difference used, 0 to 4. Fewer computed steps use fewer.
        phase: Which of the steps ``s`` after ``W = warmup_steps`` compute, of every
            ``N = cache_interval``: ``documented``, ``s = W + 1 + kN`` (MAX, diffusers);
            ``official``, ``s = W - 1 + kN`` (the authors' code, cache-dit, OpenVINO);
            ``absolute``, ``s = kN`` (MAX's Wan). The first two are equal up to
            ``N = 2``.
        coefficients: ``finite_difference``, what all published code computes, or
            ``newton``, exact for polynomials of the order also over uneven gaps. The
            same up to order 1.
        target: What is forecast: the final ``prediction`` (MAX, diffusers' lite mode),
            which skips the whole transformer; the output of each ``attention``
            (diffusers' other mode); or what all ``modules`` of each block add,
            attention and feed-forward (the paper).
    """

    name: ClassVar[str] = "taylorseer"
    summary: ClassVar[str] = (
        "Computes the first steps, then one in a few, and forecasts the others. "
        "How many is known beforehand."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#2456c8", "o")
    ladders: ClassVar[Ladders] = MappingProxyType(
        {
            "cache_interval": (2, 3, 4, 5, 6, 8, 10, 14),
            "warmup_steps": (16, 12, 9, 6, 4, 3, 2, 1),
            "max_order": (1, 2, 0),
            "compute_last": (0, 1, 2, 4),
            "coefficients": COEFFICIENTS,
        }
    )
    coarse: ClassVar[Ladders] = MappingProxyType(
        {"cache_interval": (3, 5, 8), "warmup_steps": (9, 4)}
    )

    cache_interval: int = 5
    warmup_steps: int = 9
    max_order: int = 1
    phase: str = "documented"
    coefficients: str = "finite_difference"
    target: str = "prediction"

    def __post_init__(self) -> None:
        """Checks the range of each option."""
        super().__post_init__()
        count("taylorseer: cache_interval", self.cache_interval, minimum=1)
        count("taylorseer: warmup_steps", self.warmup_steps, minimum=1)
        count("taylorseer: max_order", self.max_order, minimum=0, maximum=MAX_ORDER)
        one_of("taylorseer: phase", self.phase, PHASES)
        checked_coefficients("taylorseer", self.coefficients)
        one_of("taylorseer: target", self.target, tuple(_GROUPS))

    @property
    def graph_groups(self) -> tuple[GraphGroup, ...]:
        """Graphs that run the steps of the target, and the forecasts."""
        return (_GROUPS[self.target], "series")

    def should_skip(self, step: int) -> bool:
        """Returns whether a 0-based step may be forecast.

        Follows from the warm-up, the interval and the phase.
        """
        first = {
            "documented": self.warmup_steps + 1,
            "official": self.warmup_steps - 1,
            "absolute": 0,
        }[self.phase]
        return step >= self.warmup_steps and (step - first) % self.cache_interval != 0

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps that are forecast, unless they are required."""
        return frozenset(step for step in run.later_steps if self.should_skip(step))

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of state that a request holds, over all branches."""
        is_final = self.target == "prediction"
        value = sizes.prediction if is_final else sizes.modules[self.target]
        return sizes.branches * (self.max_order + 1) * value

    def is_repetition(self) -> bool:
        """Returns True for ``newton`` up to order 1, the same as the default."""
        return self.coefficients == "newton" and self.max_order < 2

    def create_cache(self, calibration: Calibration) -> TaylorSeer | TaylorSeerModules:
        """Creates the policy of the target; needs no calibration."""
        if self.target == "prediction":
            return TaylorSeer(self)
        return TaylorSeerModules(self)


# The documented name of the Buffer-based state.
TaylorSeerBufferState = SeriesState


@final
class TaylorSeer(SeriesCache):
    """TaylorSeer over compiled graphs, on the final prediction ("lite" in diffusers).

    All factors are linear in the last ``max_order + 1`` computed predictions, so those
    are kept, uncopied, instead of the factors: an update computes nothing, and a
    forecast is one weighted sum that reads each of them once.

    References:
        Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with
        TaylorSeers", 2025, arXiv:2503.06923. Differs: forecasts the final prediction,
        not each block's output, and uses only as many orders as steps were computed
        (MAX 26.7 starts from zeros and so doubles its first forecast at warm-up 1).
    """

    def __init__(self, config: TaylorSeerConfig) -> None:
        super().__init__(config.max_order, config.coefficients)
        self.config = config

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps that are forecast, unless they are required."""
        return self.config.skippable_steps(run)

    def decide(
        self, state: AbstractCacheState, step: int, batch: int
    ) -> Sequence[bool]:
        """Returns the step's decision, the same for all samples: whether to compute."""
        compute = history_of(state).is_empty or not self.config.should_skip(step)
        return [compute] * batch


@final
class TaylorSeerModules(AbstractModuleCache):
    """TaylorSeer on what modules give: all blocks run, with forecasts in their place.

    References:
        Liu et al., as :class:`TaylorSeer`. Differs: gates and, at ``attention``, all
        feed-forward layers are those of the present step, as in diffusers; sums are
        formed in float32 from outputs kept in the model's dtype, where diffusers keeps
        factors, by default in bfloat16.
    """

    def __init__(self, config: TaylorSeerConfig) -> None:
        self.config = config
        self.level = "attention" if config.target == "attention" else "modules"

    def create_state(self, run: Run) -> ModuleState:
        """Creates a branch's state, without module outputs."""
        return ModuleState()

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps that are forecast, unless they are required."""
        return self.config.skippable_steps(run)

    def create_memory(self) -> History:
        """Creates the memory of one module's last computed outputs."""
        return History(self.config.max_order, self.config.coefficients)

    def decide(self, state: ModuleState, step: int) -> bool:
        """Returns whether the warm-up, interval and phase have it computed."""
        return not self.config.should_skip(step)
