"""Measures, and asserts nothing. One process a runtime, in turn; ratios of medians.

    scripts/bench                     everything
    scripts/bench --only step         step | taylorseer | skip | quality | start

``step``        demo transformer step, float32, against diffusers eager
``taylorseer``  predict and update against MAX's own ``TaylorSeerCache``
``skip``        a skipped step at FLUX.1's width: forecasts against a memory copy, the
                first-block cache against its front alone
``quality``     caches on the demo model, and fewer steps: see compare_caches.py
``start``       import, and a whole ``generate`` process with everything compiled
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROUNDS = 3
AS_ON_COMMAND_LINE = ("none", "taylorseer")  # what it compiles, so already compiled
PROMPTS = [
    "a red circle above a blue square",
    "a large yellow star on a navy background",
    "a green heart left of an orange diamond on a gray background",
    "a white triangle inside a purple circle on a mint background",
    "a cyan square, a pink heart and a black star in a row",
]


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parts: dict[str, Callable[[], None]] = {
        "step": compare_step,
        "taylorseer": compare_taylorseer,
        "skip": measure_skips,
        "quality": compare_quality,
        "start": measure_start,
    }
    workers = {
        "step-ours": step_ours,
        "step-diffusers": step_diffusers,
        "taylorseer-ours": taylorseer_ours,
        "taylorseer-max": taylorseer_max,
        "skip": skip_ours,
    }
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--worker", choices=workers, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(workers[args.worker]()))
        return
    for name, part in parts.items():
        if args.only in (None, name):
            part()


def compare_step() -> None:
    """One full pass of the demo transformer."""
    _compare("demo transformer step, batch 1, 128x128", "step-diffusers", "step-ours")


def compare_taylorseer() -> None:
    """Predict and update at demo size and at FLUX.1-dev's for 1024x1024."""
    _compare("TaylorSeer, order 1, float32", "taylorseer-max", "taylorseer-ours")


def measure_skips() -> None:
    """What skipped steps cost, in a process of its own."""
    line = [sys.executable, __file__, "--worker", "skip"]
    done = subprocess.run(
        line, check=True, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    results = json.loads(done.stdout.splitlines()[-1])
    table = Table("skipped step, float32", "ms", "against", "ms", "times as long")
    for name, (ours, against, other) in results.items():
        ratio = f"{ours / other:.2f}"
        table.add_row(name, f"{ours:.3f}", against, f"{other:.3f}", ratio)
    Console().print(table)


def compare_quality() -> None:
    """Caches on the demo model, in a process of its own."""
    script = Path(__file__).with_name("compare_caches.py")
    subprocess.run([sys.executable, script], check=True, env=dict(os.environ))


def measure_start() -> None:
    """Import, and the README's command with a warm compile cache."""
    python = sys.executable
    bare = [_timed([python, "-c", "pass"]) for _ in range(ROUNDS)]
    imported = [_timed([python, "-c", "import max_diffusion"]) for _ in range(ROUNDS)]
    with tempfile.TemporaryDirectory() as folder:
        line = [python, "-m", "max_diffusion.cli", "generate", PROMPTS[0]]
        line += ["--output", str(Path(folder) / "out.png"), "--device", "cpu"]
        _timed(line)  # compiles, if nothing has yet
        whole = [_timed(line) for _ in range(ROUNDS)]
    table = Table("process", "median s")
    table.add_row("python, doing nothing", f"{statistics.median(bare):.2f}")
    table.add_row("import max_diffusion", f"{statistics.median(imported):.2f}")
    table.add_row(
        "generate, 50 steps, compiled before", f"{statistics.median(whole):.2f}"
    )
    Console().print(table)


def step_ours() -> dict[str, float]:
    """Milliseconds of a full step through MAX."""
    from max_diffusion import load_pipeline

    pipeline = load_pipeline("demo", device="cpu", caches=AS_ON_COMMAND_LINE)
    result = pipeline.generate(PROMPTS[0], seed=0, num_inference_steps=60)
    times = [record.milliseconds for record in result.report.steps[10:]]
    return {"milliseconds": statistics.median(times)}


def step_diffusers() -> dict[str, float]:
    """The same through torch, eager."""
    import torch
    from diffusers import FluxTransformer2DModel

    from max_diffusion import demo_model_path

    model = FluxTransformer2DModel.from_pretrained(
        demo_model_path(), subfolder="transformer", torch_dtype=torch.float32
    )
    config = model.config
    grid = torch.zeros(64, 3)
    inputs = {
        "hidden_states": torch.randn(1, 64, config.in_channels),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "encoder_hidden_states": torch.randn(1, 32, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "img_ids": grid,
        "txt_ids": torch.zeros(32, 3),
    }
    with torch.inference_mode():
        return {"milliseconds": _milliseconds(lambda: model(**inputs))}


def taylorseer_ours() -> dict[str, float]:
    """Milliseconds of our predict and update."""
    from max.driver import CPU
    from max.dtype import DType
    from max.engine import InferenceSession

    from max_diffusion import DenoisingCacheConfig, TaylorSeerCache

    config = DenoisingCacheConfig(taylorseer=True, taylorseer_max_order=1)
    session = InferenceSession(devices=[CPU()])
    return _time_taylorseer(TaylorSeerCache(config, DType.float32, CPU(), session))


def taylorseer_max() -> dict[str, float]:
    """Milliseconds of MAX's own."""
    from max.driver import CPU
    from max.dtype import DType
    from max.engine import InferenceSession
    from max.pipelines.diffusion import DenoisingCacheConfig, TaylorSeerCache

    config = DenoisingCacheConfig(
        taylorseer=True,
        first_block_caching=False,
        taylorseer_cache_interval=5,
        taylorseer_warmup_steps=9,
        taylorseer_max_order=1,
    )
    session = InferenceSession(devices=[CPU()])
    return _time_taylorseer(TaylorSeerCache(config, DType.float32, CPU(), session))


def skip_ours() -> dict[str, tuple[float, str, float]]:
    """Milliseconds of skipped steps, each beside what it is measured against."""
    from max.driver import CPU, Buffer
    from max.dtype import DType
    from max.engine import InferenceSession
    from max.graph import DeviceRef, Module

    from graphs.flux1 import image_ids, rotary_table
    from graphs.sampler import add_euler_step
    from max_diffusion import FirstBlockConfig, TaylorSeerConfig
    from max_diffusion.caches import Calibration, Run, add_series_graphs
    from max_diffusion.calls import run
    from max_diffusion.compile import compile_graphs
    from max_diffusion.denoising import DenoisingCacheState, run_residual_cache
    from max_diffusion.models.flux1.components import Flux1Transformer

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
    module, device = Module(), DeviceRef.CPU()
    scope = denoiser.build_graphs(module)
    add_series_graphs(module, DType.float32, device)
    add_euler_step(module, "euler_step", DType.float32, device)
    expected = {f"{scope.prefix}.{key}": slot for key, slot in scope.slots.items()}
    weights = {key: random(*slot.shape) for key, slot in expected.items()}
    session = InferenceSession(devices=[CPU()])
    models = compile_graphs(session, module, weights, expected, CPU()).models
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
        run(models, run_residual_cache(cache, memory, next(steps), denoiser, inputs))

    def front() -> None:
        start = run(models, denoiser.embed(inputs))
        run(models, denoiser.run_blocks(start, 0, 1))

    skip()  # computes
    results = {
        "first-block": (
            _milliseconds(skip, 9),
            "embed and one block",
            _milliseconds(front, 9),
        )
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

    results["taylorseer, order 1, and sampler"] = (
        _milliseconds(forecast, 300),
        "copy of as many bytes",
        _milliseconds(lambda: np.copyto(target, copied), 300),
    )
    return results


def _time_taylorseer(cache: object) -> dict[str, float]:
    from max.driver import Buffer

    results = {}
    for name, shape in (("demo", (1, 64, 32)), ("flux", (1, 4096, 64))):
        value = Buffer.from_numpy(np.random.default_rng(0).random(shape, np.float32))
        state = cache.create_state(*shape)  # type: ignore[attr-defined]
        steps = iter(range(10**9))

        def update(
            state: object = state, value: Buffer = value, steps: object = steps
        ) -> None:
            cache.update(state, value, next(steps))  # type: ignore

        results[f"{name} update"] = _milliseconds(update, 300)
        last = state.last_compute_step
        results[f"{name} predict"] = _milliseconds(
            lambda state=state, last=last: cache.predict(state, last + 3),  # type: ignore
            300,
        )
    return results


def _milliseconds(call: Callable[[], object], count: int = 50) -> float:
    for _ in range(min(10, count)):
        call()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def _timed(line: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(line, check=True, capture_output=True, env=dict(os.environ))
    return time.perf_counter() - started


def _compare(title: str, theirs: str, ours: str) -> None:
    """Alternates the two workers' processes and prints medians and their ratio."""
    runs: dict[str, list[dict[str, float]]] = {theirs: [], ours: []}
    for _ in range(ROUNDS):
        for worker, results in runs.items():
            line = [sys.executable, __file__, "--worker", worker]
            done = subprocess.run(
                line, check=True, capture_output=True, text=True, env=dict(os.environ)
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table("measure", f"{theirs} ms", f"{ours} ms", "times faster", title=title)
    for key in runs[ours][0]:
        a, b = (statistics.median(r[key] for r in runs[w]) for w in (theirs, ours))
        table.add_row(key, f"{a:.4f}", f"{b:.4f}", f"{a / b:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
