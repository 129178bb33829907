#!/usr/bin/env python3
"""What LoRAs of requests cost: time to switch, memory, and throughput when mixed.

Writes four random LoRAs of every linear layer of the demo model's transformer, lets 16
clients ask an engine for pictures with one of them, then with all four in turn, and
compares pictures with the same drawn alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from max_diffusion import GenerationRequest, TextToImagePipeline, load_pipeline
from max_diffusion.engine import Engine
from max_diffusion.pipelines.adapters import adapted

NAMES = ("a", "b", "c", "d")
CLIENTS = 16


def write_loras(folder: Path, rank: int) -> dict[str, str]:
    """Writes a file of each name; returns their paths."""
    specs = load_specs()
    found = {}
    for index, name in enumerate(NAMES):
        rng = np.random.default_rng(index)
        tensors = {}
        for module, (rows, columns) in specs.items():
            down = rng.standard_normal((rank, columns), np.float32) / columns**0.5
            up = 0.1 * rng.standard_normal((rows, rank), np.float32) / rank**0.5
            tensors[f"transformer.{module}.lora_A.weight"] = down
            tensors[f"transformer.{module}.lora_B.weight"] = up
        found[name] = str(folder / f"{name}.safetensors")
        save_file(tensors, found[name])
    return found


def load_specs() -> dict[str, tuple[int, int]]:
    """Returns the shapes of the linear layers in the transformer's blocks."""
    from max_diffusion import open_model

    needs, _ = open_model("demo", "cpu", caches=("none",)).graphs.opened.sources[
        "transformer"
    ]
    return {
        name.removesuffix(".weight"): (spec.shape[0], spec.shape[1])
        for name, spec in needs.specs.items()
        if "blocks" in name and len(spec.shape) == 2
    }


def resident() -> float:
    """Returns the MiB of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def request(client: int, turn: int, name: str, steps: int) -> GenerationRequest:
    """Returns a client's request, the same in every run."""
    return GenerationRequest(
        ("a red circle above a blue square",),
        seed=100 * client + turn,
        num_inference_steps=steps,
        loras=((name, 1.0),),
    )


def run(
    pipeline: TextToImagePipeline, names: tuple[str, ...], each: int, steps: int
) -> tuple[float, dict[tuple[int, int], np.ndarray]]:
    """Lets all clients ask; returns pictures a second, and the pictures."""
    pictures: dict[tuple[int, int], np.ndarray] = {}

    def ask(client: int) -> None:
        name = names[client % len(names)]
        for turn in range(each):
            handle = engine.submit(request(client, turn, name, steps))
            pictures[client, turn] = handle.result(600).images

    with Engine(pipeline) as engine:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(CLIENTS)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
    return CLIENTS * each / seconds, pictures


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the peak signal to noise ratio of two pictures in dB."""
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def main() -> int:
    """Measures, and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--each", type=int, default=2, help="pictures of a client")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_loras(Path(folder), args.rank)
        pipeline = load_pipeline("demo", device="cpu", adapters=adapters)
        pipeline.draw(request(0, 0, "a", 2))
        sets, compiled = pipeline.adapters, pipeline.compile_count
        first_ms, again_ms, held_mib = [], [], []
        for name in NAMES[1:]:
            gc.collect()
            before, started = resident(), time.perf_counter()
            sets.graphs_of(((name, 1.0),))
            first_ms.append(1e3 * (time.perf_counter() - started))
            held_mib.append(resident() - before)
        for name in NAMES * 5:
            started = time.perf_counter()
            adapted(pipeline, ((name, 1.0),))
            again_ms.append(1e3 * (time.perf_counter() - started))
        rates: dict[str, list[float]] = {"one": [], "four": []}
        for _ in range(args.rounds):
            one, _ = run(pipeline, NAMES[:1], args.each, args.steps)
            four, pictures = run(pipeline, NAMES, args.each, args.steps)
            rates["one"].append(one)
            rates["four"].append(four)
        worst = min(
            psnr(
                picture,
                pipeline.draw(
                    request(client, turn, NAMES[client % 4], args.steps)
                ).images,
            )
            for (client, turn), picture in pictures.items()
        )
        median = {key: float(np.median(found)) for key, found in rates.items()}
        result = {
            "compiles": pipeline.compile_count - compiled,
            "set_mib": sets.num_bytes((("b", 1.0),)) / 2**20,
            "set_resident_mib": held_mib,
            "first_use_ms": first_ms,
            "switch_ms": float(np.median(again_ms)),
            "switch_ms_worst": max(again_ms),
            "pictures_a_second": rates,
            "four_over_one": median["four"] / median["one"],
            "worst_psnr_to_alone": worst if math.isfinite(worst) else "equal",
        }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
