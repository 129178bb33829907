"""Small random Z-Image models in the diffusers layout, made with diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from folders import CAPTIONS
from qwen_folder import MORE_TEXT, build_qwen_tokenizer, filled

if TYPE_CHECKING:
    from diffusers import ZImagePipeline

TRANSFORMER: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "in_channels": 3,
        "dim": 48,
        "n_layers": 3,
        "n_refiner_layers": 2,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 40,
        "axes_dims": [4, 6, 6],
        "axes_lens": [1024, 64, 64],
    }
)
TEXT: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 1024,
    }
)
VAE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 3,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
)
# Qwen3's, as far as a prompt without tools goes.
QWEN3_TEMPLATE: Final = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def make_z_image_folder(path: Path) -> Path:
    """Writes a Z-Image folder of about 1 MB; weights differ from their defaults."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = build_qwen_tokenizer([*CAPTIONS, *MORE_TEXT])
    tokenizer.chat_template = QWEN3_TEMPLATE
    config = Qwen3Config(**TEXT, vocab_size=len(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=filled(AutoencoderKL(**VAE)),
            text_encoder=filled(Qwen3Model(config)),
            tokenizer=tokenizer,
            transformer=filled(ZImageTransformer2DModel(**TRANSFORMER)),
        )
        pipeline.save_pretrained(path)
    return path


def open_z_image_in_diffusers(folder: Path) -> ZImagePipeline:
    """The folder as diffusers reads it."""
    import torch
    from diffusers import ZImagePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
