"""Small random models in the diffusers layout, made with diffusers itself."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

# Odd on purpose, and in every option the other way than the demo model: no guidance
# embedding, exact GELU and the old end token in CLIP, ReLU in T5, quantising
# convolutions and no attention in the autoencoder.
TRANSFORMER = {
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
CAPTIONS = [
    "a red circle above a blue square",
    "two green stars on a gray background",
    "an orange heart, not a purple one",
]


def make_flux_folder(path: Path) -> Path:
    """Writes a FLUX.1 folder of about 1 MB; weights differ from their defaults."""
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
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=24,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=32,
            projection_dim=24,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=2,  # as before 2023: means the highest id
            hidden_act="gelu",
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=40,
            d_kv=8,
            num_heads=5,
            d_ff=72,
            num_layers=2,
            feed_forward_proj="relu",
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=2,
        mid_block_add_attention=False,
        latent_channels=5,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.6,
        shift_factor=0.1,
    )
    transformer = FluxTransformer2DModel(**TRANSFORMER)
    for model in (clip, t5, vae, transformer):
        _roughen(model)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline.save_pretrained(path)
    return path


def _roughen(model: object) -> None:
    """Moves norms' scales off 1 and biases off 0, where mistakes would hide."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():  # type: ignore[attr-defined]
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def copy_folder(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, target))
