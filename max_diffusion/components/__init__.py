"""Text encoders, tokenizers and autoencoders that several model families share."""

from .autoencoder_kl import AutoencoderKLDecoder, autoencoder_config
from .clip import ClipTextEncoder, clip_config
from .config import require_one_of, select_fields
from .t5 import T5TextEncoder, t5_config
from .texts import check_ids, notes_of_cuts
from .tokenizers import AbstractTokenizer, load_clip_tokenizer, load_t5_tokenizer

__all__ = [
    "AbstractTokenizer",
    "AutoencoderKLDecoder",
    "ClipTextEncoder",
    "T5TextEncoder",
    "autoencoder_config",
    "check_ids",
    "clip_config",
    "load_clip_tokenizer",
    "load_t5_tokenizer",
    "notes_of_cuts",
    "require_one_of",
    "select_fields",
    "t5_config",
]
