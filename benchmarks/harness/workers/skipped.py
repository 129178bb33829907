"""Skipped steps at FLUX.1-dev's width, each beside the least that it could take."""

from __future__ import annotations

import json

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Module
from taylorseer import milliseconds

from graphs.rotary import image_ids, rotary_table
from graphs.sampler import add_euler_step
from max_diffusion import FirstBlockConfig, TaylorSeerConfig
from max_diffusion.caches import (
    Calibration,
    DenoisingCacheState,
    Run,
    add_series_graphs,
)
from max_diffusion.execution.compiler import CompiledGraphs
from max_diffusion.execution.graph_call import run
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.models.flux1.transformer import Flux1Transformer


def main() -> None:
    """Measures, prints."""
    # FLUX.1-dev's width, with three blocks, so that there is a tail to skip.
    sizes = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": [16, 56, 56],
    }
    side, text_len = 16, 128  # 256 x 256 pixels
    tokens, axes = side * side, (16, 56, 56)
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return 0.02 * rng.standard_normal(shape, np.float32)

    denoiser = Flux1Transformer(sizes, "float32", [CPU()], None)
    denoiser.graph_groups = frozenset(["blocks"])
    device = DeviceRef.CPU()

    def build_steps(module: Module) -> None:
        add_series_graphs(module, DType.float32, device)
        add_euler_step(module, "euler_step", DType.float32, device)

    modules = [
        GraphModule(name, build, is_for_cpu=True)
        for name, build in denoiser.graph_modules().items()
    ]
    weights = {
        key: random(*slot.shape)
        for module in modules
        for key, slot in module.needs.named_slots.items()
    }
    graphs = CompiledGraphs(InferenceSession(devices=[CPU()]), CPU())
    graphs.add([*modules, GraphModule("steps", build_steps)], lambda: weights)
    models = graphs.models
    denoiser.bind(models)
    arrays = {
        "latents": random(1, tokens, 64),
        "timestep": np.full(1, 500, np.float32),
        "text": random(1, text_len, 4096),
        "pooled_text": random(1, 768),
        "text_rotary": rotary_table(np.zeros((text_len, 3)), axes),
        "image_rotary": rotary_table(image_ids(side, side), axes),
    }
    inputs = {name: Buffer.from_numpy(array) for name, array in arrays.items()}
    cache = FirstBlockConfig(threshold=1e9).create_cache(Calibration())
    memory = DenoisingCacheState(cache, cache.create_state(Run()))
    steps = iter(range(10**9))

    def skip() -> None:
        run(models, cache.run_step(memory, next(steps), denoiser, inputs))

    def front() -> None:
        start = run(models, denoiser.embed(inputs))
        run(models, denoiser.run_blocks(start, 0, 1))

    skip()  # computes
    results = {
        "skipped step, first-block, 384 tokens": {
            "max_diffusion float32": milliseconds(skip, 9),
            "its front alone float32": milliseconds(front, 9),
        }
    }
    # A prediction of FLUX.1-dev at 1024 x 1024.
    forecasts = TaylorSeerConfig().create_cache(Calibration())
    state = forecasts.create_state(Run())
    latents = Buffer.from_numpy(random(1, 4096, 64))
    for step in range(2):
        value = Buffer.from_numpy(random(1, 4096, 64))
        run(models, forecasts.remember(state, value, step))
    dt = Buffer.from_numpy(np.full(1, -0.02, np.float32))
    # Two predictions and the latents are read; the forecast is written and read again,
    # the latents are written.
    copied = random(3 * 4096 * 64)
    target = np.empty_like(copied)

    def forecast() -> None:
        prediction = run(models, forecasts.forecast(state, 4))
        models["euler_step"].execute(latents, prediction, dt)

    results["skipped step, taylorseer and sampler, FLUX.1 at 1024 x 1024"] = {
        "max_diffusion float32": milliseconds(forecast),
        "memory copy float32": milliseconds(lambda: np.copyto(target, copied)),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
