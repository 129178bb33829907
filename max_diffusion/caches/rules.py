"""Steps that must be computed whatever a cache decides: masks, policies, cool-down."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.validation import count, whole
from ..errors import RequestError
from .config import AbstractCacheConfig
from .masks import POLICIES, policy_steps


@dataclass(frozen=True, kw_only=True)
class StepRules(AbstractCacheConfig):
    """Options that every cache that skips steps has beside its own.

    Attributes:
        compute_steps: Steps that are always computed: their 0-based indices, or a
            policy (slow, medium, fast, ultra), which is cache-dit's mask for the
            request's number of steps. Empty for none.
        compute_last: Steps at the end that are always computed.
    """

    compute_steps: tuple[int, ...] | str = ()
    compute_last: int = 0

    def __post_init__(self) -> None:
        """Checks the type and range of both rules."""
        count("cache: compute_last", self.compute_last, minimum=0)
        if isinstance(self.compute_steps, str):
            if self.compute_steps not in POLICIES:
                raise RequestError(
                    f"cache: compute_steps must be step indices or one of "
                    f"{', '.join(POLICIES)}, got {self.compute_steps!r}"
                )
            return
        if not isinstance(self.compute_steps, tuple):
            raise RequestError(
                "cache: compute_steps must be a tuple of step indices, got "
                f"{self.compute_steps!r}"
            )
        for step in self.compute_steps:
            count("cache: a step of compute_steps", step, minimum=0)

    def required_steps(self, num_steps: int | None) -> frozenset[int]:
        """Returns the 0-based steps that must be computed in a run of ``num_steps``.

        Raises:
            RequestError: A step beyond the run, or a rule that needs the number of
                steps without one.
        """
        named = self.compute_steps
        if num_steps is not None:
            whole("cache: num_inference_steps", num_steps, minimum=1)
        else:
            if self.compute_last or isinstance(named, str):
                raise RequestError(
                    "cache: compute_last and policies need the number of steps; give "
                    "run=Run(num_steps=...) to create_cache_state"
                )
            return frozenset(named)
        if isinstance(named, str):
            named = tuple(policy_steps(named, num_steps))
        beyond = [step for step in named if step >= num_steps]
        if beyond:
            raise RequestError(
                f"cache: compute_steps names step {beyond[0]}, but the last of "
                f"{num_steps} is {num_steps - 1}"
            )
        last = range(max(0, num_steps - self.compute_last), num_steps)
        return frozenset((*named, *last))
