"""Run reports without a run."""

from __future__ import annotations

from typing import Any

from max_diffusion.core.report import RunReport, StepRecord


def make_step(step: int = 0, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "branch": "conditional",
        "sigma": 1 - step / 10,
        "timestep": 1000 - step * 100,
        "actions": ("compute",),
        "signal": None,
        "milliseconds": 10.0,
    }
    return StepRecord(**values | changes)


def make_report(steps: tuple[StepRecord, ...] = (), **changes: Any) -> RunReport:
    values: dict[str, Any] = {
        "model": "demo",
        "device": "cpu",
        "dtype": "float32",
        "prompts": ("a red circle",),
        "negative_prompt": None,
        "height": 128,
        "width": 96,
        "num_inference_steps": max((s.step + 1 for s in steps), default=1),
        "guidance_scale": 3.5,
        "true_cfg_scale": 1.0,
        "seed": 7,
        "num_images": 1,
        "image_tokens": 64,
        "text_tokens": 32,
        "cache": {"name": "none"},
        "steps": steps,
        "cache_bytes": 0,
        "load_seconds": 0.1,
        "compile_seconds": 0.2,
        "compile_count": 1,
        "encode_seconds": 0.3,
        "denoise_seconds": 0.4,
        "decode_seconds": 0.5,
        "total_seconds": 1.2,
        "warnings": (),
        "sampler": "FlowMatchEuler",
        "versions": {"max-diffusion": "0.1.0"},
    }
    return RunReport(**values | changes)
