"""Small random Qwen-Image models in the diffusers layout, made with diffusers."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from folders import CAPTIONS

if TYPE_CHECKING:
    import torch
    from diffusers import QwenImagePipeline
    from transformers import Qwen2Tokenizer

# Of Qwen's vocabulary, in its order.
SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MORE_TEXT: Final = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:",
    "system user assistant",
    "naïve café — 東京の夜景 🎨🖌️ it's 42.5% of what they've got!!!",
)
TRANSFORMER: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 3,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 40,
        "axes_dims_rope": (4, 6, 6),
    }
)
TEXT: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [1, 1, 2],
        },
    }
)
VAE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "base_dim": 8,
        "z_dim": 3,
        "dim_mult": [1, 2, 3],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": [0.1, -0.2, 0.3],
        "latents_std": [1.5, 0.5, 2.0],
    }
)
SCHEDULER: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    }
)


def make_qwen_folder(
    path: Path,
    transformer: Mapping[str, Any] = TRANSFORMER,
    text: Mapping[str, Any] = TEXT,
    vae: Mapping[str, Any] = VAE,
) -> Path:
    """Writes a Qwen-Image folder of about 1 MB; weights differ from their defaults."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = build_qwen_tokenizer([*CAPTIONS, *MORE_TEXT])
    rows = len(tokenizer) + 4
    config = Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": rows},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
        },
        vision_start_token_id=rows - 4,
        vision_end_token_id=rows - 3,
        image_token_id=rows - 2,
        video_token_id=rows - 1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=filled(AutoencoderKLQwenImage(**vae)),
            text_encoder=filled(Qwen2_5_VLForConditionalGeneration(config)),
            tokenizer=tokenizer,
            transformer=filled(QwenImageTransformer2DModel(**transformer)),
        )
        pipeline.save_pretrained(path)
    return path


def open_qwen_in_diffusers(folder: Path) -> QwenImagePipeline:
    """The folder as diffusers reads it."""
    import torch
    from diffusers import QwenImagePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_qwen_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """A tokenizer as Qwen's whose merges are learned from a few texts.

    Every byte is in the vocabulary, so any text encodes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    template = Qwen2Tokenizer(vocab={SPECIAL_TOKENS[0]: 0})._tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer = template.normalizer
    learner.pre_tokenizer = template.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    more = list(SPECIAL_TOKENS[1:])
    return Qwen2Tokenizer(
        vocab=learned["vocab"], merges=merges, additional_special_tokens=more
    )


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Fills a model by its tensors' names, so that activations keep their size.

    Norms' scales are about 1 and biases about 0, but not just that: mistakes would hide
    there.
    """
    import torch

    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            drawn = rng.standard_normal(tuple(value.shape))
            if "gamma" in name or value.ndim == 1:
                drawn = 0.1 * drawn + (not name.endswith("bias"))
            elif "embed_tokens" not in name:
                drawn /= np.sqrt(np.prod(value.shape[1:]))
            value.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return model.eval()
