"""The same by diffusers on torch: ``python -m benchmarks.gpu.theirs JOB``."""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.harness.workers.common import peak_mib

warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
from transformers import CLIPTextModel, T5EncoderModel  # noqa: E402

diffusers.logging.set_verbosity_error()


def main() -> None:
    """Does what the job says, and prints what was measured as JSON."""
    job = json.loads(sys.argv[1])
    kind, _, index = job["device"].partition(":")
    if kind == "gpu" and not torch.cuda.is_available():
        sys.exit(
            f"torch {torch.__version__} sees no GPU; install the build of torch for it"
        )
    device = torch.device(f"cuda:{index or 0}" if kind == "gpu" else "cpu")
    works: Mapping[str, Callable[[Mapping[str, Any], torch.device], dict[str, Any]]] = {
        "step": step,
        "picture": picture,
    }
    with torch.inference_mode():
        found = works[job["what"]](job, device)
    found["versions"] = {name: version(name) for name in ("diffusers", "torch")}
    found["host_mib"] = peak_mib()
    if device.type == "cuda":
        found["allocated_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    print(json.dumps(found))


def load_transformer(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads tensor by tensor to the device: the host never holds all of them."""
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel.from_config(config).to(dtype)
    transformer = transformer.to_empty(device=device).eval()
    state = transformer.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                state.pop(name).copy_(file.get_tensor(name))
    if state:
        sys.exit(f"{folder}: {len(state)} weights are missing, the first {min(state)}")
    return transformer


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step(job: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The transformer alone."""
    started = time.perf_counter()
    dtype = getattr(torch, job["dtype"])
    transformer = load_transformer(Path(job["folder"]) / "transformer", dtype, device)
    if job["is_compiled"]:
        transformer.compile()
    with np.load(job["inputs"]) as arrays:
        given = {key: torch.from_numpy(arrays[key]).to(device) for key in arrays.files}
    inputs = {
        "hidden_states": given["latents"].to(dtype),
        "timestep": given["timestep"].to(dtype) / 1000,
        "guidance": given["guidance"].to(dtype),
        "encoder_hidden_states": given["text"].to(dtype),
        "pooled_projections": given["pooled_text"].to(dtype),
        "img_ids": given["image_ids"],
        "txt_ids": torch.zeros(given["text"].shape[1], 3, device=device),
    }
    synchronize(device)
    ready = time.perf_counter()

    def once() -> Any:
        prediction = transformer(**inputs, return_dict=False)[0]
        synchronize(device)
        return prediction

    prediction = once()
    first = time.perf_counter() - ready
    times = []
    for _ in range(job["repeats"]):
        before = time.perf_counter()
        prediction = once()
        times.append(1e3 * (time.perf_counter() - before))
    np.save(f"{job['output']}-step.npy", prediction.float().cpu().numpy())
    found = {
        "load_seconds": ready - started,
        "first_seconds": first,
        "step_ms": times,
    }
    if job["is_compiled"] and times:
        # It compiles in the first call.
        found["compile_seconds"] = first - statistics.median(times) / 1e3
    return found


def picture(job: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Whole pictures, without a cache and, not compiled, with TaylorSeer."""
    started = time.perf_counter()
    folder, dtype = Path(job["folder"]), getattr(torch, job["dtype"])
    transformer = load_transformer(folder / "transformer", dtype, device)
    pipeline = diffusers.FluxPipeline.from_pretrained(
        folder,
        transformer=transformer,
        text_encoder=CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=dtype
        ),
        text_encoder_2=T5EncoderModel.from_pretrained(
            folder / "text_encoder_2", dtype=dtype
        ),
        torch_dtype=dtype,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if job["is_compiled"]:
        transformer.compile()
    synchronize(device)
    ready = time.perf_counter()
    calls = [0]
    if not job["is_compiled"]:  # compiled, a hook would break the graph
        # Reached only where no cache stands in for it.
        probe = transformer.single_transformer_blocks[-1].attn.to_q
        probe.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def draw(steps: int) -> np.ndarray:
        calls[0] = 0
        images = pipeline(
            job["prompt"],
            height=job["side"],
            width=job["side"],
            num_inference_steps=steps,
            guidance_scale=3.5,
            max_sequence_length=job["text_tokens"],
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="np",
        ).images
        synchronize(device)
        return np.asarray((images[0] * 255).round(), np.uint8)

    cases, first = {}, 0.0
    for name in job["cases"]:
        times = []
        for index in range(1 + job["repeats"]):
            if name == "taylorseer":
                transformer.enable_cache(
                    diffusers.TaylorSeerCacheConfig(
                        cache_interval=job["interval"],
                        disable_cache_before_step=job["warmup"],
                        max_order=1,
                        taylor_factors_dtype=dtype,
                        use_lite_mode=True,  # the prediction, as ours
                    )
                )
            before = time.perf_counter()
            image = draw(job["steps"] if index else job["first_steps"])
            took = time.perf_counter() - before
            if name == "taylorseer":
                transformer.disable_cache()
            if index:
                times.append(1e3 * took)
            first = first or took
        if job["repeats"]:
            np.save(f"{job['output']}-{name}.npy", image)
        full = job["steps"] if job["is_compiled"] else calls[0]
        cases[name] = {"picture_ms": times, "full_steps": full}
    return {
        "load_seconds": ready - started,
        "first_seconds": first,
        "cases": cases,
    }


if __name__ == "__main__":
    main()
