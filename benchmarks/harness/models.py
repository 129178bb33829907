"""The models that are measured: the demo model, and a larger, random one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from max.driver import CPU
from safetensors.numpy import save_file

from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.models.flux1.transformer import Flux1Transformer
from max_diffusion.pipelines.opening import demo_model_path

from .artefact_cache import digest, made_once


@dataclass(frozen=True)
class Size:
    """One model at one size of image."""

    name: str
    """Name of its group of figures, and of its folder."""
    title: str
    """Words for it in tables."""
    side: int
    """Height and width of the images in pixels."""
    steps: int
    """Denoising steps of an image that is timed."""
    interval: int
    """TaylorSeer's ``cache_interval``, in all runtimes."""
    warmup: int
    """TaylorSeer's ``warmup_steps``, in all runtimes."""
    first_steps: int
    """Denoising steps of the image that is drawn before any is timed."""
    repeats: int
    """How many images a process draws with each cache."""
    max_rounds: int
    """How many processes a runtime has at most."""
    caches: Mapping[str, Mapping[str, Any]]
    """The caches that are measured, by name, with the options they are given;
    TaylorSeer's are above."""


DEMO: Final = Size(
    name="demo",
    title="demo model, 128 x 128, 50 steps",
    side=128,
    steps=50,
    interval=5,
    warmup=9,
    first_steps=50,
    repeats=3,
    max_rounds=100,
    caches=MappingProxyType(
        {
            "taylorseer": {},
            "first-block": {"threshold": 0.1},
            "magcache": {},
            "pab": {},
            "fastercache": {},
            "auto": {},
            "step-mask": {},
        }
    ),
)
# Seconds a step: as few as tell computed steps and others apart. Random weights have
# no dynamics, so that first-block is told to skip all that it may.
LARGE: Final = Size(
    name="flux-300m",
    title="FLUX.1 of 283 M random parameters, 512 x 512, 6 steps",
    side=512,
    steps=6,
    interval=3,
    warmup=2,
    first_steps=2,
    repeats=1,
    max_rounds=1,
    caches=MappingProxyType(
        {"taylorseer": {}, "first-block": {"threshold": 1e6}, "pab": {}}
    ),
)
# FLUX.1-dev's head width and positions; a third of its width, a fifth of its blocks.
_LARGE_TRANSFORMER: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "num_layers": 4,
        "num_single_layers": 8,
        "num_attention_heads": 8,
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
    }
)


def model_folder(size: Size, work: Path) -> Path:
    """The folder of a size's model; the large one is written once.

    Args:
        size: :data:`DEMO` or :data:`LARGE`.
        work: Folder in which the large model is kept.
    """
    if size is DEMO:
        return demo_model_path()
    return made_once(work / size.name, model_digest(size), _write_large)


def model_digest(size: Size) -> str:
    """The digest of all that a size's model is made of."""
    parts: list[str | Path] = [demo_model_path()]
    if size is LARGE:
        parts.append(json.dumps(dict(_LARGE_TRANSFORMER)))
    return digest(parts)


def _write_large(folder: Path) -> None:
    """The demo model with a larger transformer of random weights."""
    shutil.copytree(demo_model_path(), folder, dirs_exist_ok=True)
    (folder / "cache_calibration.json").unlink()  # of another transformer
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) | _LARGE_TRANSFORMER
    path.write_text(json.dumps(config, indent=1) + "\n")
    transformer = Flux1Transformer(config, "float32", [CPU()], None)
    transformer.graph_groups = frozenset(["full"])
    [build] = transformer.graph_modules().values()
    rng = np.random.default_rng(0)
    arrays = {}
    module = GraphModule("full", build, is_for_cpu=True)
    for name, spec in module.needs.specs.items():
        shape = tuple(int(n) for n in spec.shape)
        is_norm = len(shape) == 1 and name.endswith("weight")
        # Spread so that activations neither vanish nor grow.
        spread = 1 / math.sqrt(shape[-1])
        arrays[name] = (
            np.ones(shape, np.float32)
            if is_norm
            else spread * rng.standard_normal(shape, np.float32)
        )
    save_file(arrays, folder / "transformer" / "diffusion_pytorch_model.safetensors")
