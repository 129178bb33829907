"""Text encoders, tokenizers and autoencoders that several model families share."""

from .autoencoder_kl import (
    AutoencoderKLDecoder,
    AutoencoderKLEncoder,
    autoencoder_config,
)
from .clip import ClipTextEncoder, clip_config
from .config import require_one_of, select_fields
from .t5 import T5TextEncoder, t5_config
from .tokenizers import AbstractTokenizer, load_clip_tokenizer, load_t5_tokenizer

__all__ = [
    "AbstractTokenizer",
    "AutoencoderKLDecoder",
    "AutoencoderKLEncoder",
    "ClipTextEncoder",
    "T5TextEncoder",
    "autoencoder_config",
    "clip_config",
    "load_clip_tokenizer",
    "load_t5_tokenizer",
    "require_one_of",
    "select_fields",
    "t5_config",
]
