"""Text encoders, tokenizers and autoencoders that several model families share."""

from .autoencoder_kl import (
    AutoencoderKLDecoder,
    AutoencoderKLEncoder,
    autoencoder_config,
)
from .byte_level_bpe import (
    NO_TOKEN,
    TemplateTokenizer,
    load_byte_level_tokenizer,
    padding_id,
)
from .causal_lm import CausalLMTextEncoder, causal_lm_config, causal_lm_weights
from .clip import ClipTextEncoder, clip_config
from .config import require_one_of, select_fields
from .ldm_autoencoder import from_ldm, is_ldm
from .packed_decoder import PackedDecoder
from .t5 import T5TextEncoder, t5_config
from .texts import notes_of_cuts
from .tokenizer_files import check_ids, require_special_tokens
from .tokenizers import AbstractTokenizer, load_clip_tokenizer, load_t5_tokenizer

__all__ = [
    "NO_TOKEN",
    "AbstractTokenizer",
    "AutoencoderKLDecoder",
    "AutoencoderKLEncoder",
    "CausalLMTextEncoder",
    "ClipTextEncoder",
    "PackedDecoder",
    "T5TextEncoder",
    "TemplateTokenizer",
    "autoencoder_config",
    "causal_lm_config",
    "causal_lm_weights",
    "check_ids",
    "clip_config",
    "from_ldm",
    "is_ldm",
    "load_byte_level_tokenizer",
    "load_clip_tokenizer",
    "load_t5_tokenizer",
    "notes_of_cuts",
    "padding_id",
    "require_one_of",
    "require_special_tokens",
    "select_fields",
    "t5_config",
]
