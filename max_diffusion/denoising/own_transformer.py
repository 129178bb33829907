"""The adapter for a pipeline whose ``run_transformer`` is its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from max.driver import Buffer, Device

from ..caches import (
    AbstractCache,
    AbstractCacheConfig,
    AbstractStepCache,
    Action,
    DenoisingCacheState,
    FirstBlockCache,
    FirstBlockConfig,
)
from ..caches.kinds import Inputs
from ..caches.kinds.base import latents_shape
from ..errors import MaxDiffusionError, RequestError
from ..execution.graph_call import Routine, on_device

RunTransformer = Callable[..., tuple[Buffer, ...]]
"""``(cache_state, **inputs)`` to ``(noise_pred,)``, or under first-block caching to
``(new_residual, noise_pred)``: MAX's documented contract."""
_DECIDED = ("threshold", "warmup_steps", "compute_steps", "compute_last")


@final
class OwnTransformer:
    """Runs steps by an override of ``run_transformer``, which is one opaque call.

    Caches that forecast the prediction work as on any transformer. First-block caching
    is decided inside of the override, in a graph of its own; all other caches need the
    blocks one by one, and are refused.

    Args:
        run_transformer: The override.
        owner: The pipeline's name, for messages.
        device: Where its inputs are placed.
    """

    is_divisible = False

    def __init__(
        self, run_transformer: RunTransformer, owner: str, device: Device
    ) -> None:
        self._run_transformer = run_transformer
        self._owner, self._device = owner, device

    def check(self, config: AbstractCacheConfig, cache: AbstractCache) -> None:
        """Whether a cache has an effect here, with all of its options.

        Raises:
            RequestError: It has none.
        """
        if isinstance(cache, FirstBlockCache):
            defaults = vars(FirstBlockConfig())
            for name, value in vars(config).items():
                if name not in _DECIDED and value != defaults[name]:
                    raise RequestError(
                        f"first-block: {name} has no effect on {self._owner}, which "
                        "decides by itself; leave it out"
                    )
        elif not isinstance(cache, AbstractStepCache):
            raise RequestError(
                f"cache: {config.name} has no effect on {self._owner}, whose "
                "transformer is not split into blocks; use a cache that forecasts the "
                "prediction"
            )

    def run_step(
        self, memory: DenoisingCacheState, step: int, inputs: Inputs
    ) -> Routine[Buffer]:
        """One step: the prediction ``(B, S_img, C)``."""
        cache = memory.cache
        if isinstance(cache, AbstractStepCache):
            transformer = _Call(self, memory)
            return cache.run_step(memory, step, transformer, inputs)
        assert isinstance(cache, FirstBlockCache), "checked when the cache was bound"
        return self._run_own_decision(cache, memory, step, inputs)

    def call(self, memory: DenoisingCacheState, inputs: Inputs) -> tuple[Buffer, ...]:
        """Runs the override on inputs that are placed on the device."""
        placed = {name: on_device(x, self._device) for name, x in inputs.items()}
        return self._run_transformer(memory, **placed)

    def _run_own_decision(
        self,
        cache: FirstBlockCache,
        memory: DenoisingCacheState,
        step: int,
        inputs: Inputs,
    ) -> Routine[Buffer]:
        yield from ()
        batch, _ = latents_shape(inputs)
        is_required = step < cache.config.warmup_steps or step in memory.required_steps
        if memory.changes_to(inputs) or is_required:
            memory.prev_residual = memory.prev_output = None
        before = memory.prev_output
        outputs = self.call(memory, inputs)
        if len(outputs) != 2:
            raise MaxDiffusionError(
                "run_transformer: expected (new_residual, noise_pred) under "
                f"first-block caching, got {len(outputs)} values"
            )
        memory.prev_residual, memory.prev_output = outputs
        # Only it knows what it did; giving the old prediction back is a reuse.
        action = Action.REUSE if outputs[1] is before else Action.COMPUTE
        memory.actions = (action,) * batch
        return outputs[1]


@final
class _Call:
    """The override for one step of one branch, as a transformer that is one piece."""

    is_divisible = False

    def __init__(self, owner: OwnTransformer, memory: DenoisingCacheState) -> None:
        self._owner, self._memory = owner, memory

    def full(self, inputs: Inputs) -> Routine[Buffer]:
        yield from ()
        return self._owner.call(self._memory, inputs)[0]

    def rows_of(self, inputs: Inputs, rows: Sequence[int]) -> Inputs:
        raise AssertionError("not divisible")
