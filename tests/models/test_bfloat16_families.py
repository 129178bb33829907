"""Families in bfloat16 on a CPU: as close to float32 as diffusers is, caches too.

Slow: graphs of bfloat16 are compiled here, as processors differ in what they multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cogvideox_folder import TEXT_LENGTH, make_cogvideox_folder
from diffusers import CogVideoXPipeline
from flux2_folder import make_flux2_folder, open_flux2_in_diffusers
from folders import TEST_GRAPHS
from pictures import psnr
from qwen_folder import make_qwen_folder, open_qwen_in_diffusers
from z_image_folder import make_z_image_folder, open_z_image_in_diffusers

from max_diffusion import TextToImagePipeline, load_pipeline
from max_diffusion.caches import cache_from_options

SEED = 5
PROMPT = "two green stars on a gray background"
# All that need no measurements; random weights change much from step to step.
SETTINGS: dict[str, dict[str, Any]] = {
    "taylorseer": {},
    "step-mask": {},
    "auto": {"tolerance": 50.0},
    "first-block": {"threshold": 3.0},
    "pab": {},
    "fastercache": {},
}


def open_cogvideox_in_diffusers(folder: Path) -> CogVideoXPipeline:
    found = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


@dataclass(frozen=True)
class Family:
    """How a folder of a family is made, opened and asked for a small picture."""

    make: Callable[[Path], Any]
    open: Callable[[Path], Any]
    size: tuple[int, int]
    ours: dict[str, Any]
    theirs: dict[str, Any]


FAMILIES = {
    "qwen-image": Family(
        make_qwen_folder,
        open_qwen_in_diffusers,
        (24, 40),
        {"true_cfg_scale": 4.0},
        {"true_cfg_scale": 4.0, "negative_prompt": " "},
    ),
    "z-image": Family(
        make_z_image_folder,
        open_z_image_in_diffusers,
        (32, 48),
        {"true_cfg_scale": 4.0},
        {"guidance_scale": 3.0},
    ),
    "flux2": Family(
        partial(make_flux2_folder, is_distilled=False),
        open_flux2_in_diffusers,
        (32, 48),
        {"true_cfg_scale": 4.0},
        {"guidance_scale": 4.0},
    ),
    "cogvideox": Family(
        partial(make_cogvideox_folder, variant="5b"),
        open_cogvideox_in_diffusers,
        (16, 40),
        {"true_cfg_scale": 4.0, "num_frames": 9},
        {"guidance_scale": 4.0, "num_frames": 9, "max_sequence_length": TEXT_LENGTH},
    ),
}


@contextmanager
def noise_of_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch draws other numbers in bfloat16: here the same, rounded."""
    drawn = torch.randn

    def randn(*shape: Any, dtype: torch.dtype | None = None, **given: Any) -> Any:
        noise = drawn(*shape, dtype=torch.float32, **given)
        return noise if dtype is None else noise.to(dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_in_diffusers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    folder = tmp_path / "model"
    family.make(folder)
    height, width = family.size
    given: dict[str, Any] = {"height": height, "width": width}
    given["num_inference_steps"] = 20

    def of(pipeline: TextToImagePipeline, **settings: Any) -> Any:
        return pipeline.generate(PROMPT, seed=SEED, **given, **family.ours, **settings)

    def by_diffusers(dtype: torch.dtype) -> np.ndarray:
        pipeline = family.open(folder).to(dtype)
        with torch.no_grad(), noise_of_float32(monkeypatch):
            drawn = pipeline(
                prompt=PROMPT,
                generator=torch.Generator("cpu").manual_seed(SEED),
                output_type="np",
                **given,
                **family.theirs,
            )
        values = drawn.frames if hasattr(drawn, "frames") else drawn.images
        return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)

    caches = ("none", *SETTINGS)
    whole, half = (
        load_pipeline(
            folder,
            device="cpu",
            dtype=dtype,
            caches=caches,
            precompiled=[TEST_GRAPHS / name],  # of float32
        )
        for dtype in ("float32", "bfloat16")
    )
    wanted = by_diffusers(torch.float32)
    first = of(whole)
    assert psnr(first.frames.reshape(wanted.shape), wanted) >= 55
    theirs = psnr(by_diffusers(torch.bfloat16), wanted)
    drawn = of(half).frames
    assert not np.array_equal(drawn, first.frames), "drawn in float32"
    ours = psnr(drawn, first.frames)
    print(f"\n{name}: bfloat16 {ours:.1f} dB from float32, diffusers {theirs:.1f}")
    assert ours >= theirs - 1
    for cache, options in SETTINGS.items():
        config = cache_from_options(cache, options)
        one, other = (of(pipeline, cache=config) for pipeline in (whole, half))
        apart = psnr(other.frames, one.frames)
        steps = [step.actions for step in other.report.steps]
        print(f"  {cache}: {apart:.1f} dB, {other.report.full_passes} full passes")
        assert len(set(steps)) > 1, "nothing was cached"
        assert apart >= min(ours, theirs) - 6
