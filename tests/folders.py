"""Small random models in the diffusers layout, made with diffusers itself."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

# Odd on purpose, and in every option the other way than the demo model: no guidance
# embedding, exact GELU and the old end token in CLIP, ReLU in T5, quantising
# convolutions and no attention in the autoencoder.
TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 20,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 24,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 6, 6),
}
TEST_GRAPHS = Path(__file__).parent / "compiled_graphs"
"""What scripts/prebuild compiles of the models that tests draw with: a folder of graphs
for each, ``float32`` and ``bfloat16`` of :func:`make_flux_folder`."""
CAPTIONS = [
    "a red circle above a blue square",
    "two green stars on a gray background",
    "an orange heart, not a purple one",
]


def make_uniform_folder(path: Path) -> Path:
    """Writes a FLUX.1 folder with one block of each kind and one width everywhere.

    Few distinct kernels, the costly part of compiling for a GPU, but one of every kind:
    FLUX's own head width of 128 for flash attention, guidance, gated GELU in T5,
    attention in the autoencoder.
    """
    transformer = TRANSFORMER | {
        "in_channels": 128,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 1,
        "joint_attention_dim": 128,
        "pooled_projection_dim": 128,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }
    return _save_folder(
        path,
        transformer,
        clip={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "projection_dim": 128,
            "hidden_act": "quick_gelu",
        },
        t5={
            "d_model": 128,
            "d_kv": 128,
            "num_heads": 1,
            "d_ff": 512,
            "num_layers": 1,
            "feed_forward_proj": "gated-gelu",
        },
        vae={
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (64, 64),
            "layers_per_block": 1,
            "latent_channels": 32,
        },
    )


def make_flux_folder(path: Path) -> Path:
    """Writes a FLUX.1 folder of about 1 MB; weights differ from their defaults."""
    return _save_folder(
        path,
        TRANSFORMER,
        clip={
            "hidden_size": 24,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "projection_dim": 24,
            "eos_token_id": 2,  # as before 2023: means the highest id
            "hidden_act": "gelu",
        },
        t5={
            "d_model": 40,
            "d_kv": 8,
            "num_heads": 5,
            "d_ff": 72,
            "num_layers": 2,
            "feed_forward_proj": "relu",
        },
        vae={
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 2,
            "mid_block_add_attention": False,
            "latent_channels": 5,
            "scaling_factor": 0.6,
            "shift_factor": 0.1,
        },
    )


def _save_folder(
    path: Path,
    transformer_config: dict[str, Any],
    clip: dict[str, Any],
    t5: dict[str, Any],
    vae: dict[str, Any],
) -> Path:
    import torch
    from demo_tokenizers import build_clip_tokenizer, build_t5_tokenizer
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(11)
    clip_tokenizer = build_clip_tokenizer(CAPTIONS)
    t5_tokenizer = build_t5_tokenizer(CAPTIONS)
    ends = {
        "bos_token_id": clip_tokenizer.bos_token_id,
        "eos_token_id": clip_tokenizer.eos_token_id,
    }
    clip_model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer), max_position_embeddings=32, **ends | clip
        )
    )
    t5_model = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), **t5))
    vae_model = AutoencoderKL(norm_num_groups=4, sample_size=32, **vae)
    transformer = FluxTransformer2DModel(**transformer_config)
    for model in (clip_model, t5_model, vae_model, transformer):
        roughen(model)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae_model,
        text_encoder=clip_model,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5_model,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline.save_pretrained(path)
    return path


def roughen(model: object) -> None:
    """Moves norms' scales off 1 and biases off 0, where mistakes would hide."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():  # type: ignore[attr-defined]
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def copy_folder(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, target))
