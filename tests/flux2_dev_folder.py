"""Small random FLUX.2-dev models in the diffusers layout, made with diffusers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flux2_folder import SCHEDULER, TEXT, TRANSFORMER, make_flux2_vae
from folders import CAPTIONS
from qwen_folder import MORE_TEXT, filled

if TYPE_CHECKING:
    from diffusers import Flux2Pipeline
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS: Final = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
)
# How Mistral's vocabulary cuts words: by case, digits one by one.
_WORDS: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set text %}{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{% endset %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def build_mistral_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of Mistral's kind; it pads texts before they begin."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )
    found.chat_template = MISTRAL_TEMPLATE
    return found


def make_flux2_dev_folder(path: Path) -> Path:
    """Writes a FLUX.2-dev folder of about 1 MB; no weights are their defaults."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer = build_mistral_tokenizer([*CAPTIONS, *MORE_TEXT])
    text: dict[str, Any] = {
        **TEXT,
        "model_type": "mistral",
        "num_hidden_layers": 31,
        "sliding_window": None,
        "rope_theta": 1e7,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    transformer = {**TRANSFORMER, "guidance_embeds": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        config = Mistral3Config(text_config=text, vision_config=vision)
        pipeline = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
            vae=make_flux2_vae(),
            text_encoder=filled(Mistral3ForConditionalGeneration(config)),
            tokenizer=tokenizer,
            transformer=filled(Flux2Transformer2DModel(**transformer)),
        )
        pipeline.save_pretrained(path)
    # A processor of pictures and texts, of which only the tokenizer is used.
    index = path / "model_index.json"
    known = json.loads(index.read_text())
    known["tokenizer"] = ["transformers", "PixtralProcessor"]
    index.write_text(json.dumps(known))
    return path


def open_flux2_dev_in_diffusers(folder: Path) -> Flux2Pipeline:
    """The folder's parts as diffusers reads them, with the tokenizer alone."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            folder / "scheduler"
        )
        pipeline = Flux2Pipeline(
            scheduler=scheduler,
            vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"),
            text_encoder=Mistral3ForConditionalGeneration.from_pretrained(
                folder / "text_encoder"
            ),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            transformer=Flux2Transformer2DModel.from_pretrained(folder / "transformer"),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
