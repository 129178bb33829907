"""TaylorSeer on the final prediction: forecast it from its last computed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from max.graph import DeviceRef, Module

from graphs.caches import taylorseer as graphs

from ..buffers import to_device
from ..checks import whole
from ..errors import CacheStateError, RequestError
from .base import AbstractCacheState, AbstractStepCache, GraphGroup

if TYPE_CHECKING:
    from max.engine import Model

MAX_ORDER = 2


@dataclass(frozen=True)
class TaylorSeerConfig:
    """Knobs of TaylorSeer.

    Attributes:
        cache_interval: A step in this many is computed after the warm-up; 1 computes
            all.
        warmup_steps: Steps at the start that always compute.
        max_order: Highest difference used, 0 to 2. Fewer computed steps use fewer.
    """

    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("full", "taylorseer")

    cache_interval: int = 5
    warmup_steps: int = 9
    max_order: int = 1

    def __post_init__(self) -> None:
        """Checks the ranges."""
        whole("taylorseer: cache_interval", self.cache_interval, minimum=1)
        whole("taylorseer: warmup_steps", self.warmup_steps, minimum=1)
        if not 0 <= whole("taylorseer: max_order", self.max_order) <= MAX_ORDER:
            raise RequestError(
                f"taylorseer: max_order must be 0 to {MAX_ORDER}, got {self.max_order}"
            )

    def should_skip(self, step: int) -> bool:
        """The documented rule: step W is forecast, W + 1 computed, then every N-th."""
        if step < self.warmup_steps:
            return False
        return (step - self.warmup_steps - 1) % self.cache_interval != 0


@final
@dataclass
class TaylorSeerState(AbstractCacheState):
    """Differences of the prediction at the last computed step of one branch."""

    factors: list[Buffer] = field(default_factory=list)
    """Factor 0 to at most ``max_order``, each ``(B, S_img, C)``; only valid ones."""
    last_compute_step: int | None = None
    shape: tuple[int, ...] = ()
    """Of every factor; asking a buffer for it takes as long as a small forecast."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(b.num_elements * b.element_size for b in self.factors)


# The documented name of the Buffer-based state.
TaylorSeerBufferState = TaylorSeerState


def add_graphs(module: Module, dtype: DType, device: DeviceRef) -> None:
    """Adds predict and update for every order to a pipeline's module."""
    for order in range(1, MAX_ORDER + 1):
        name = f"taylorseer_predict_{order}"
        graphs.add_predict(module, name, dtype, device, order=order)
        name = f"taylorseer_update_{order}"
        graphs.add_update(module, name, dtype, device, order=order)


@final
class TaylorSeer(AbstractStepCache):
    """TaylorSeer over compiled graphs, on the final prediction ("lite" in diffusers).

    A forecast reads ``order + 1`` prediction-sized buffers and writes one; factor 0 is
    the prediction itself, uncopied, so order 1 holds two such buffers per branch.

    References:
        Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with
        TaylorSeers", 2025, arXiv:2503.06923. Differs: forecasts the final prediction,
        not each block's output, and uses only as many orders as steps were computed
        (MAX 26.7 starts from zeros and so doubles its first forecast at warm-up 1).
    """

    def __init__(
        self, config: TaylorSeerConfig, models: Mapping[str, Model], device: Device
    ) -> None:
        self.config = config
        self._models = models
        self._device = device

    def create_step_state(self) -> TaylorSeerState:
        """An empty state: nothing is allocated before the first computed step."""
        return TaylorSeerState()

    def should_compute(self, state: AbstractCacheState, step: int) -> bool:
        """By the documented rule, and always without history."""
        assert isinstance(state, TaylorSeerState)
        return not state.factors or not self.config.should_skip(step)

    def forecast(self, state: AbstractCacheState, step: int) -> Buffer:
        """Sums the series at ``step``; see :class:`TaylorSeerCache`."""
        assert isinstance(state, TaylorSeerState)
        if not state.factors or state.last_compute_step is None:
            raise CacheStateError(
                f"taylorseer: step {step} cannot be predicted before a computed step; "
                "call update first"
            )
        order = len(state.factors) - 1
        if order == 0:
            return state.factors[0]
        offset = self._scalars(state, step - state.last_compute_step)
        model = self._models[f"taylorseer_predict_{order}"]
        return model.execute(offset, *state.factors)[0]

    def remember(
        self, state: AbstractCacheState, noise_pred: Buffer, step: int
    ) -> None:
        """Replaces the factors; a new shape starts the history again."""
        assert isinstance(state, TaylorSeerState)
        old, shape = state.factors, tuple(noise_pred.shape)
        if state.shape != shape:
            old, state.shape = [], shape
        order = min(len(old), self.config.max_order)
        higher: list[Buffer] = []
        if order:
            assert state.last_compute_step is not None
            gap = step - state.last_compute_step
            if gap <= 0:
                raise CacheStateError(
                    f"taylorseer: step {step} was computed after step "
                    f"{state.last_compute_step}; steps must increase"
                )
            rate = self._scalars(state, 1 / gap)
            model = self._models[f"taylorseer_update_{order}"]
            higher = list(model.execute(rate, noise_pred, *old[:order]))
        state.factors = [noise_pred, *higher]
        state.last_compute_step = step

    def _scalars(self, state: TaylorSeerState, value: float) -> Buffer:
        return to_device(np.full(state.shape[0], value, np.float32), self._device)
