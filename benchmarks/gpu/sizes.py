"""The models that are checked: FLUX.1-dev's shapes, and the demo model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final


@dataclass(frozen=True)
class GpuSize:
    """One model of random weights, at one size of image."""

    name: str
    """Name of its folder."""
    title: str
    """Words for it on the page."""
    side: int
    """Height and width of the images in pixels."""
    cell: int
    """Pixels a side that one image token stands for."""
    text_tokens: int
    """Text tokens that the transformer reads."""
    clip_tokens: int
    """Text tokens that CLIP reads."""
    steps: int
    """Denoising steps of an image that is timed."""
    interval: int
    """TaylorSeer's ``cache_interval``, in all runtimes."""
    warmup: int
    """TaylorSeer's ``warmup_steps``, in all runtimes."""
    step_repeats: int
    """Steps that a process times."""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What differs from the demo model's configurations, by component."""
    cut: Mapping[str, int] = field(default_factory=dict)
    """What differs in the transformer that is run in float32 too."""


_FLUX: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "transformer": {
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
        },
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
            "max_position_embeddings": 77,
            "vocab_size": 49408,
        },
        "text_encoder_2": {
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_heads": 64,
            "num_layers": 24,
            "vocab_size": 32128,
        },
        "vae": {
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "norm_num_groups": 32,
            "sample_size": 1024,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
    }
)
FULL: Final = GpuSize(
    name="flux-dev",
    title="FLUX.1-dev's shapes with random weights, 1024 x 1024, 28 steps",
    side=1024,
    cell=16,
    text_tokens=512,
    clip_tokens=77,
    steps=28,
    interval=4,
    warmup=4,
    step_repeats=20,
    configs=_FLUX,
    cut=MappingProxyType({"num_layers": 2, "num_single_layers": 4}),
)
TINY: Final = GpuSize(
    name="tiny",
    title="the demo model's shapes with random weights, 128 x 128, 8 steps",
    side=128,
    cell=16,
    text_tokens=32,
    clip_tokens=32,
    steps=8,
    interval=3,
    warmup=2,
    step_repeats=5,
)
SIZES: Final[Mapping[str, GpuSize]] = MappingProxyType({"full": FULL, "tiny": TINY})
