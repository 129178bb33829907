"""What a cache remembers, and when it must not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from max.driver import Buffer

from max_diffusion import AbstractCacheConfig, AutoConfig, StepMaskConfig
from max_diffusion.caches import Calibration, DenoisingCacheState, Run
from max_diffusion.caches.kinds import AbstractStepCache, Inputs
from max_diffusion.caches.series_cache import SeriesState
from max_diffusion.execution.graph_call import Routine, run


class Doubling:
    """A transformer that gives its latents, doubled, and counts."""

    is_divisible = True

    def __init__(self) -> None:
        self.computed = 0

    def full(self, inputs: Inputs) -> Routine[Buffer]:
        yield from ()
        self.computed += 1
        latents = inputs["latents"]
        assert isinstance(latents, Buffer)
        return Buffer.from_numpy(latents.to_numpy() * 2)

    def rows_of(self, inputs: Inputs, rows: Sequence[int]) -> Inputs:
        raise AssertionError("all samples are alike here")


def inputs(batch: int = 2, tokens: int = 6, text: int = 4) -> Inputs:
    return {
        "latents": Buffer.from_numpy(np.ones((batch, tokens, 3), np.float32)),
        "timestep": np.full(batch, 500, np.float32),
        "text": Buffer.from_numpy(np.ones((batch, text, 5), np.float32)),
    }


@pytest.mark.parametrize(
    "other",
    [{"text": 9}, {"tokens": 8}, {"batch": 3}],
    ids=["prompt", "picture", "batch"],
)
@pytest.mark.parametrize(
    "config", [StepMaskConfig(compute_steps=(0,), max_order=0)], ids=lambda c: c.name
)
def test_other_shapes_begin_a_new_history(
    config: AbstractCacheConfig, other: dict[str, int]
) -> None:
    cache, transformer = config.create_cache(Calibration()), Doubling()
    assert isinstance(cache, AbstractStepCache)  # asks for no split transformer
    memory = DenoisingCacheState(
        cache, cache.create_state(Run(9)), config.required_steps(9)
    )
    for step in range(3):
        run({}, cache.run_step(memory, step, transformer, inputs()))
    assert transformer.computed == 1
    assert memory.actions == ("predict",) * 2
    run({}, cache.run_step(memory, 3, transformer, inputs(**other)))
    assert transformer.computed == 2
    assert memory.actions == ("compute",) * other.get("batch", 2)
    assert isinstance(memory.state, SeriesState)
    # Nothing of the steps before: only the one that was computed now.
    assert memory.state.history.orders.tolist() == [0] * other.get("batch", 2)
    assert memory.state.last_compute_step == 3
    run({}, cache.run_step(memory, 4, transformer, inputs(**other)))
    assert transformer.computed == 2


def test_equal_shapes_go_on() -> None:
    config = AutoConfig(max_order=1)
    cache = config.create_cache(Calibration())
    memory = DenoisingCacheState(cache, cache.create_state(Run(9)))
    assert memory.changes_to(inputs())
    assert not memory.changes_to(inputs())
    assert memory.changes_to(inputs(text=5))
    assert not memory.changes_to(inputs(text=5))
