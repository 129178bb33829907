"""The FLUX.2 pipeline, that of FLUX.2-dev."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, Final, final

from ...components import AutoencoderKLDecoder
from ...core.request import PromptTexts
from ...pipelines import Tokenized
from .components import Flux2TextEncoder, Flux2Transformer
from .config import text_weights, transformer_weights
from .pipeline import SHARED_CLASSES, AbstractFlux2Pipeline, PromptTemplate

# What Black Forest Labs tells the language model before every prompt.
_SYSTEM: Final = (
    "You are an AI that reasons about image descriptions. You give structured "
    "responses focusing on object relationships, object\nattribution and actions "
    "without speculation."
)
# Stands for a picture in what Mistral reads; taken out of prompts, as by diffusers.
_PICTURE: Final = "[IMG]"


@final
class Flux2Pipeline(AbstractFlux2Pipeline):
    """FLUX.2-dev: prompts by Mistral, distilled guidance that the transformer is told.

    diffusers can have the language model rewrite prompts; this cannot.
    """

    components = {  # noqa: RUF012  # the documented contract is a plain class attribute
        "text_encoder": Flux2TextEncoder,
        "transformer": Flux2Transformer,
        "vae": AutoencoderKLDecoder,
    }
    class_names: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            **SHARED_CLASSES,
            "text_encoder": ("Mistral3ForConditionalGeneration",),
            "tokenizer": ("PixtralProcessor",),
        }
    )
    weight_transforms = MappingProxyType(
        {
            "text_encoder": text_weights(max(Flux2TextEncoder.output_layers)),
            "transformer": transformer_weights,
        }
    )
    # Mistral's template of a chat.
    template = PromptTemplate(
        before=f"<s>[SYSTEM_PROMPT]{_SYSTEM}[/SYSTEM_PROMPT][INST]",
        after="[/INST]",
        tokens=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
        end="</s>",
        padding="<pad>",
    )
    has_guidance = True
    default_guidance_scale = 4.0
    default_num_inference_steps = 50

    def default_sources(self) -> Mapping[str, str]:
        """Returns where the defaults come from, by the request's names."""
        names = (
            "height",
            "width",
            "num_inference_steps",
            "guidance_scale",
            "max_sequence_length",
        )
        return dict.fromkeys(names, "diffusers")

    def tokenize(self, texts: PromptTexts, length: int, what: str) -> Tokenized:
        """Tokenizes each text with its template, without what stands for pictures."""
        first = tuple(text.replace(_PICTURE, "") for text in texts.first)
        return super().tokenize(replace(texts, first=first), length, what)
