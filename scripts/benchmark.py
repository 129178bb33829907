"""Measures, and asserts nothing. One process a runtime, in turn; ratios of medians.

    scripts/bench                     everything
    scripts/bench --only step         step | taylorseer | quality | start

``step``        demo transformer step, float32, against diffusers eager
``taylorseer``  predict and update against MAX's own ``TaylorSeerCache``
``quality``     caches on the demo model, and fewer steps: passes, time, PSNR
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
from demo_checker import check
from demo_scenes import held_out_scene
from rich.console import Console
from rich.table import Table

ROUNDS = 3
JUDGED = 20
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
        "quality": compare_caches,
        "start": measure_start,
    }
    workers = {
        "step-ours": step_ours,
        "step-diffusers": step_diffusers,
        "taylorseer-ours": taylorseer_ours,
        "taylorseer-max": taylorseer_max,
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


def compare_caches() -> None:
    """50 steps of held-out prompts with each cache, and the same with fewer steps.

    A cache is worth its trouble where it is closer to the uncached pictures than as
    many steps as take the same time.
    """
    from max_diffusion import (
        AutoConfig,
        CacheConfig,
        FirstBlockConfig,
        NoCacheConfig,
        StepMaskConfig,
        TaylorSeerConfig,
        load_pipeline,
    )

    rng = np.random.default_rng(11)
    scenes = [held_out_scene(rng) for _ in range(JUDGED)]
    pipeline = load_pipeline("demo", device="cpu")
    table = Table("cache", "steps", "ms", "passes saved %", "worst", "median", "right")
    runs: list[tuple[str, CacheConfig, int]] = [("none", NoCacheConfig(), 50)]
    runs += [("fewer steps", NoCacheConfig(), n) for n in (30, 20, 15, 12, 10, 8)]
    caches: list[CacheConfig] = [
        TaylorSeerConfig(cache_interval=3, warmup_steps=4),
        TaylorSeerConfig(cache_interval=4, warmup_steps=4),
        TaylorSeerConfig(cache_interval=5, warmup_steps=9),
        TaylorSeerConfig(cache_interval=4, warmup_steps=4, max_order=2),
        TaylorSeerConfig(4, 4, 2, coefficients="newton"),
        TaylorSeerConfig(4, 4, compute_last=2),
        AutoConfig(tolerance=0.02),
        AutoConfig(tolerance=0.05),
        AutoConfig(tolerance=0.1),
        AutoConfig(tolerance=0.05, max_order=2, coefficients="newton"),
        FirstBlockConfig(0.05),
        FirstBlockConfig(0.1),
        FirstBlockConfig(0.2),
        FirstBlockConfig(0.1, tail_order=1),
        FirstBlockConfig(0.2, tail_order=1),
        StepMaskConfig(compute_steps="medium"),
        StepMaskConfig(compute_steps="fast"),
    ]
    runs += [("", cache, 50) for cache in caches]
    plain: list[np.ndarray] = []
    for label, cache, steps in runs:
        results = [
            pipeline.generate(
                scene.caption, seed=index, num_inference_steps=steps, cache=cache
            )
            for index, scene in enumerate(scenes)
        ]
        pictures = [result.images[0] for result in results]
        plain = plain or pictures
        psnrs = [psnr(x, y) for x, y in zip(pictures, plain, strict=True)]
        full = sum(result.report.full_passes for result in results)
        took = [result.report.denoise_seconds * 1e3 for result in results]
        verdicts = [check(x, s) for x, s in zip(pictures, scenes, strict=True)]
        table.add_row(
            label or _label(cache),
            str(steps),
            f"{statistics.median(took):.0f}",
            f"{100 * (1 - full / (50 * len(scenes))):.0f}",
            f"{min(psnrs):.1f}",
            f"{statistics.median(psnrs):.1f}",
            f"{sum(verdict.is_right for verdict in verdicts)}",
        )
    title = f"{JUDGED} held-out prompts; PSNR dB against 50 steps uncached"
    table.title = title
    Console(width=160).print(table)


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


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of two uint8 pictures, dB."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def _label(cache: object) -> str:
    """A configuration's name and what differs from its defaults."""
    kind = type(cache)
    changed = [
        f"{key}={value}"
        for key, value in vars(cache).items()
        if value != vars(kind()).get(key)
    ]
    return f"{kind.__name__.removesuffix('Config')} {' '.join(changed)}"


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
    for _ in range(10):
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
