"""Every guidance rule, against the same in float64, and against published figures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Module

from max_diffusion.execution.compiler import CompiledGraphs
from max_diffusion.execution.graph_call import run
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.sampling import (
    AbstractGuidance,
    DynamicGuidance,
    LinearGuidance,
    RescaledGuidance,
    Schedule,
)


@pytest.fixture(scope="module")
def models() -> Mapping[str, Model]:
    return compiled()


def compiled() -> Mapping[str, Model]:
    def build(module: Module) -> None:
        for rule in (LinearGuidance(), RescaledGuidance()):
            rule.add_graphs(module, DType.float32, DeviceRef.CPU())

    graphs = CompiledGraphs(InferenceSession(devices=[CPU()]), CPU())
    graphs.add([GraphModule("guidance", build)], dict)
    return graphs.models


def combined(
    models: Mapping[str, Model], rule: AbstractGuidance, pair: np.ndarray, scale: float
) -> np.ndarray:
    buffers = [Buffer.from_numpy(values.copy()) for values in pair]
    routine = rule.combine(buffers, scale, CPU(), stage=0)
    return run(models, routine).to_numpy()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 12), (3, 5, 64)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 7.0])
def test_linear_guidance(
    models: Mapping[str, Model], shape: tuple[int, ...], scale: float
) -> None:
    pair = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    conditional, unconditional = pair.astype(np.float64)
    wanted = unconditional + scale * (conditional - unconditional)
    found = combined(models, LinearGuidance(), pair, scale)
    assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 12), (3, 5, 64)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rescaled_guidance_has_each_tokens_conditional_length(
    models: Mapping[str, Model], shape: tuple[int, ...], scale: float
) -> None:
    pair = np.random.default_rng(2).standard_normal((2, *shape)).astype(np.float32)
    conditional, unconditional = pair.astype(np.float64)
    guided = unconditional + scale * (conditional - unconditional)
    lengths = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (conditional, guided)]
    found = combined(models, RescaledGuidance(), pair, scale)
    assert np.abs(found - guided * lengths[0] / lengths[1]).max() < 1e-5


def test_a_rescaled_token_of_zeros_stays_so(models: Mapping[str, Model]) -> None:
    pair = np.ones((2, 1, 2, 3), np.float32)
    pair[:, 0, 0] = 0
    found = combined(models, RescaledGuidance(), pair, 4.0)
    assert np.array_equal(found[0, 0], np.zeros(3))
    assert found[0, 1] == pytest.approx([1, 1, 1])


def schedule(timesteps: list[float]) -> Schedule:
    sigmas = np.linspace(1, 0, len(timesteps) + 1, dtype=np.float32)
    return Schedule(sigmas, np.array(timesteps, np.float32))


def test_dynamic_scales_are_the_published_ones() -> None:
    """As CogVideoXPipeline of diffusers 0.42 gives them for a scale of 6."""
    times = [999.0, 979.0, 959.0, *np.linspace(939, 99, 45), 59.0, 19.0]
    found = DynamicGuidance().scales(6.0, schedule(times))
    assert found[[0, 1, 2, 48, 49]] == pytest.approx(
        [2.291487, 2.543503, 6.974352, 1.000001, 1.123398], abs=1e-5
    )


def test_other_scales_are_the_same_in_all_steps() -> None:
    for rule in (LinearGuidance(), RescaledGuidance()):
        assert rule.scales(2.5, schedule([900.0, 400.0])).tolist() == [2.5, 2.5]
