"""Small random FLUX.2-klein models in the diffusers layout, made with diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from folders import CAPTIONS
from qwen_folder import MORE_TEXT, build_qwen_tokenizer, filled
from z_image_folder import QWEN3_TEMPLATE

if TYPE_CHECKING:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

TRANSFORMER: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "in_channels": 12,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 72,
        "axes_dims_rope": (4, 4, 4, 4),
        "mlp_ratio": 2.5,
        "guidance_embeds": False,
    }
)
# As deep as the states that are read, and one layer more.
TEXT: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 28,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
)
VAE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "block_out_channels": (8, 16),
        "decoder_block_out_channels": (12, 20),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 3,
        "norm_num_groups": 4,
    }
)
SCHEDULER: Final[Mapping[str, Any]] = MappingProxyType(
    {"shift": 3.0, "use_dynamic_shifting": True}
)


def make_flux2_folder(path: Path, *, is_distilled: bool) -> Path:
    """Writes a FLUX.2-klein folder of about 1 MB; no weights are their defaults."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_qwen_tokenizer([*CAPTIONS, *MORE_TEXT])
    tokenizer.chat_template = QWEN3_TEMPLATE
    config = Qwen3Config(**TEXT, vocab_size=len(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=make_flux2_vae(),
            text_encoder=filled(Qwen3ForCausalLM(config)),
            tokenizer=tokenizer,
            transformer=filled(Flux2Transformer2DModel(**TRANSFORMER)),
            is_distilled=is_distilled,
        )
        pipeline.save_pretrained(path)
    return path


def make_flux2_vae() -> AutoencoderKLFlux2:
    """Makes a random autoencoder, each of its channels with a scale of its own."""
    import torch
    from diffusers import AutoencoderKLFlux2

    vae = filled(AutoencoderKLFlux2(**VAE))
    generator = torch.Generator().manual_seed(3)
    statistics = vae.bn
    assert isinstance(statistics, torch.nn.BatchNorm2d)
    assert statistics.running_mean is not None
    assert statistics.running_var is not None
    statistics.running_mean.normal_(generator=generator)
    statistics.running_var.uniform_(0.2, 3.0, generator=generator)
    return vae


def open_flux2_in_diffusers(folder: Path) -> Flux2KleinPipeline:
    """The folder as diffusers reads it."""
    import torch
    from diffusers import Flux2KleinPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
