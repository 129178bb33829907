"""Small random CogVideoX models in the diffusers layout, made with diffusers itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

from folders import CAPTIONS, roughen

TEXT_LENGTH: Final = 12
# Odd widths, and heads, levels and layers that differ from each other.
TRANSFORMER: Final[dict[str, Any]] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 20,
    "text_embed_dim": 40,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 6,
    "sample_frames": 9,
    "max_text_seq_length": TEXT_LENGTH,
}
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5": {
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
    },
}
"""What differs between the released models' transformers."""
# Here it is doubled once, so that the width changes where it is not, too.
VAE_OF_1_5: Final[dict[str, Any]] = {
    "block_out_channels": (8, 16, 16),
    "temporal_compression_ratio": 2,
}
# Three levels; the number of frames is doubled after the first two.
VAE: Final[dict[str, Any]] = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.7,
}


def make_cogvideox_folder(path: Path, variant: str) -> Path:
    """Writes a CogVideoX folder of 1 MB; all variants have the same T5."""
    import torch
    from demo_tokenizers import build_t5_tokenizer
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(5)
    tokenizer = build_t5_tokenizer(CAPTIONS)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=40,
            d_kv=8,
            num_heads=5,
            d_ff=72,
            num_layers=2,
            feed_forward_proj="gated-gelu",
        )
    )
    vae = AutoencoderKLCogVideoX(**VAE | (VAE_OF_1_5 if variant == "1.5" else {}))
    sizes = {"temporal_compression_ratio": vae.config.temporal_compression_ratio}
    transformer = CogVideoXTransformer3DModel(
        **TRANSFORMER, **VARIANTS[variant], **sizes
    )
    for model in (t5, vae, transformer):
        roughen(model)
    is_2b = variant == "2b"
    scheduler = (CogVideoXDDIMScheduler if is_2b else CogVideoXDPMScheduler)(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0 if is_2b else 1.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipeline = CogVideoXPipeline(tokenizer, t5, vae, transformer, scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline.save_pretrained(path)
    return path
