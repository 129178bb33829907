"""A step, or pictures, by max_diffusion: ``python -m benchmarks.gpu.ours JOB``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from max.driver import Buffer, Device

from benchmarks.harness.workers.common import peak_mib
from max_diffusion import TaylorSeerConfig, load_pipeline
from max_diffusion.caches import cache_from_options
from max_diffusion.checkpoint import ComponentWeights
from max_diffusion.core.buffers import from_numpy, to_device, to_numpy
from max_diffusion.errors import ModelLoadError
from max_diffusion.execution.compiler import (
    CompiledGraphs,
    memory_errors_said,
    open_session,
)
from max_diffusion.execution.devices import resolve_device, resolve_dtype
from max_diffusion.execution.graph_call import run
from max_diffusion.execution.graph_library import GraphLibrary
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.execution.targets import targets_of
from max_diffusion.models.flux1.transformer import Flux1Transformer


def main() -> None:
    """Does what the job says, and prints what was measured as JSON."""
    job = json.loads(sys.argv[1])
    device = resolve_device(job["device"])
    works: Mapping[str, Callable[[Mapping[str, Any], Device], dict[str, Any]]] = {
        "device": describe,
        "step": step,
        "picture": picture,
    }
    with memory_errors_said():
        found = works[job["what"]](job, device)
    found["versions"] = {name: version(name) for name in ("max-diffusion", "max")}
    found["host_mib"] = peak_mib()
    print(json.dumps(found))


def describe(job: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """What MAX says of the device, and the target that its graphs are for."""
    if device.is_host:
        return {"name": "cpu", "targets": [t.name for t in targets_of(device)]}
    stats = {key: value for key, value in device.stats.items() if _is_plain(value)}
    return {
        "name": device.model_name,
        "api": device.api,
        "architecture": device.architecture_name,
        "targets": [target.name for target in targets_of(device)],
        "stats": stats,
    }


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def step(job: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """The transformer alone, uncached."""
    started = time.perf_counter()
    dtype = resolve_dtype(job["dtype"], device)
    folder = Path(job["folder"]) / "transformer"
    config = json.loads((folder / "config.json").read_text())
    weights = ComponentWeights.from_files(
        "transformer", sorted(folder.glob("*.safetensors"))
    )
    transformer = Flux1Transformer(config, dtype.name, [device], weights)
    transformer.name = "transformer"
    transformer.graph_groups = frozenset(["full"])
    [(name, build)] = transformer.graph_modules().items()
    module = GraphModule(name, build, is_for_cpu=device.is_host)
    problems = weights.problems(module.needs.specs)
    if problems:
        raise ModelLoadError("; ".join(problems))
    library = GraphLibrary(device, job["precompiled"])
    graphs = CompiledGraphs(open_session(device), device, library)
    graphs.add(
        [module],
        lambda: {
            f"transformer.{key}": array
            for key, array in weights.load(
                module.needs.slots, check_finite=False
            ).items()
        },
    )
    transformer.bind(graphs.models)
    with np.load(job["inputs"]) as arrays:
        inputs = {
            key: from_numpy(arrays[key], dtype, device)
            if key in ("text", "pooled_text")
            else to_device(arrays[key], device)
            for key in arrays.files
            if key != "image_ids"
        }
    device.synchronize()
    ready = time.perf_counter()

    def once() -> Buffer:
        prediction = run(graphs.models, transformer.full(inputs))
        device.synchronize()
        return prediction

    prediction = once()
    first = time.perf_counter()
    times = []
    for _ in range(job["repeats"]):
        before = time.perf_counter()
        prediction = once()
        times.append(1e3 * (time.perf_counter() - before))
    np.save(f"{job['output']}-step.npy", to_numpy(prediction).astype(np.float32))
    return {
        "compile_seconds": graphs.compile_seconds,
        "load_seconds": ready - started - graphs.compile_seconds,
        "first_seconds": first - ready,
        "step_ms": times,
    }


def picture(job: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """Whole pictures, without a cache and with TaylorSeer."""
    started = time.perf_counter()
    pipeline = load_pipeline(
        job["folder"],
        device=job["device"],
        dtype=job["dtype"],
        precompiled=job["precompiled"],
    )
    device.synchronize()
    ready = time.perf_counter()
    caches = {
        "none": cache_from_options("none"),
        "taylorseer": TaylorSeerConfig(job["interval"], job["warmup"]),
    }
    cases = {}
    for name in job["cases"]:
        times = []
        for index in range(1 + job["repeats"]):
            before = time.perf_counter()
            result = pipeline.generate(
                job["prompt"],
                seed=0,
                height=job["side"],
                width=job["side"],
                num_inference_steps=job["steps"] if index else job["first_steps"],
                cache=caches[name],
            )
            if index:  # the first is not timed: allocations
                times.append(1e3 * (time.perf_counter() - before))
        if job["repeats"]:
            np.save(f"{job['output']}-{name}.npy", result.images[0])
        cases[name] = {"picture_ms": times, "full_steps": result.report.full_passes}
    return {
        "compile_seconds": pipeline.seconds["compile"],
        "load_seconds": ready - started - pipeline.seconds["compile"],
        "cases": cases,
    }


if __name__ == "__main__":
    main()
