"""What all FLUX.2 pipelines share: text, or text and pictures, to image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, final

import numpy as np
from max.driver import Buffer

from graphs.rotary import image_ids, rotary_table

from ...components import (
    NO_TOKEN,
    AutoencoderKLEncoder,
    CausalLMTextEncoder,
    TemplateTokenizer,
    autoencoder_config,
    causal_lm_config,
    check_ids,
    load_byte_level_tokenizer,
    notes_of_cuts,
    padding_id,
    require_special_tokens,
)
from ...core.grid import Grid
from ...core.options import RequestOptions, option
from ...core.request import GenerationContext, GenerationRequest, PromptTexts
from ...errors import ModelLoadError
from ...pipelines import Tokenized
from ...sampling import FlowMatchEulerSampler
from ..autoencoder_pipeline import AutoencoderPipeline
from .config import flux2_config
from .lora_names import LORA_NAMES
from .noise import packed_noise
from .pictures import Flux2Pictures

SHARED_CLASSES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
    }
)
"""Classes that saved the components that all have, by their roles."""
_TEXT_TOKENS: Final = 512
_SIDE: Final = 1024
# Along the first axis of positions: what is drawn is at 0, references follow.
_REFERENCE_STRIDE: Final = 10


@final
@dataclass(frozen=True)
class Flux2Options(RequestOptions):
    """Options that requests may set on FLUX.2 only."""

    max_sequence_length: int | None = option(
        "text tokens that the language model reads, padding and those around the "
        f"prompt included; longer prompts are cut; default: {_TEXT_TOKENS}. It changes "
        "the picture",
        minimum=1,
        maximum=_TEXT_TOKENS,
    )


@dataclass(frozen=True)
class PromptTemplate:
    """The template of a chat in which a language model reads prompts."""

    before: str
    """What comes before each."""
    after: str
    """What comes after it."""
    end: str
    """The special token that its vocabulary has in any case."""
    tokens: tuple[str, ...]
    """The special tokens among these."""
    padding: str
    """What texts are filled up with, where the tokenizer's files do not say."""


class AbstractFlux2Pipeline(AutoencoderPipeline):
    """Draws with a FLUX.2, from text and from pictures.

    Pictures of a request are tokens behind those that are drawn, through all blocks.

    | graph | purpose | calls per request |
    |---|---|---|
    | ``text_encoder`` | language model | 1, 2 with true guidance |
    | ``transformer.full``, or its blocks one by one | denoiser | steps, branches |
    | ``weighted_sum_n``, ``relative_error`` | forecasts | by the cache |
    | ``euler_step``, ``guidance`` | sampler | each step |
    | ``vae.decode`` | latents to uint8 | 1, or more for many images |
    | ``vae_encoder.encode`` | picture to latents | each picture |
    """

    picture_components = {"vae_encoder": ("vae", AutoencoderKLEncoder)}  # noqa: RUF012
    options_class = Flux2Options
    lora_names = LORA_NAMES
    weight_ignores: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "vae": ("encoder.*", "quant_conv.*", "bn.num_batches_tracked"),
            "vae_encoder": (
                "decoder.*",
                "post_quant_conv.*",
                "bn.num_batches_tracked",
            ),
        }
    )
    default_size = _SIDE, _SIDE
    default_negative_prompt = ""
    template: ClassVar[PromptTemplate]
    """Of the language model."""

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Checks that the components are of one model."""
        transformer = flux2_config(configs["transformer"])
        if transformer.guidance_embeds is not cls.has_guidance:
            raise ModelLoadError(
                f"flux2: transformer: guidance_embeds must be {cls.has_guidance} for "
                f"{cls.__name__}, got {transformer.guidance_embeds}; does "
                "model_index.json name another pipeline?"
            )
        encoder = (cls.components or {})["text_encoder"]
        assert issubclass(encoder, CausalLMTextEncoder)
        layers = encoder.output_layers
        vae = autoencoder_config(configs["vae"])
        text = causal_lm_config(configs["text_encoder"])
        if vae.batch_norm_eps is None:
            raise ModelLoadError(
                "flux2: vae: config.json has no batch_norm_eps; is it the "
                "configuration of an AutoencoderKLFlux2?"
            )
        if transformer.in_channels != 4 * vae.latent_channels:
            raise ModelLoadError(
                f"flux2: the transformer takes {transformer.in_channels} channels, "
                f"but with this vae it must take 4 * {vae.latent_channels}; are they "
                "of one model?"
            )
        if text.num_hidden_layers < max(layers):
            raise ModelLoadError(
                f"flux2: text_encoder must have {max(layers)} layers or more, "
                f"got {text.num_hidden_layers}; is it of another model?"
            )
        channels = len(layers) * text.hidden_size
        if transformer.joint_attention_dim != channels:
            raise ModelLoadError(
                "flux2: the transformer reads text states of "
                f"{transformer.joint_attention_dim} channels, but text_encoder gives "
                f"{len(layers)} * {text.hidden_size}; are they of one model?"
            )

    def init_remaining_components(self) -> None:
        """Loads the tokenizer and the sampler, and reads the sizes."""
        configs = self.pipeline_config.components
        folder = self.pipeline_config.path
        assert folder is not None, "built by load_pipeline"
        template, encoder = self.template, self._text_encoder
        words = load_byte_level_tokenizer(folder / "tokenizer", template.end)
        require_special_tokens(words, folder / "tokenizer", template.tokens)
        side = "left" if encoder.pads_before else "right"
        self._padding = padding_id(words, folder / "tokenizer", side, template.padding)
        self._tokenizer = TemplateTokenizer(words, template.before, template.after)
        rows = causal_lm_config(configs["text_encoder"]).vocab_size
        check_ids("tokenizer", self._tokenizer.vocab_size, rows)
        self.sampler = FlowMatchEulerSampler.from_config(
            configs["scheduler"], empirical_mu
        )
        self._sizes = flux2_config(configs["transformer"])
        self._vae = autoencoder_config(configs["vae"])
        # An image token is 2 x 2 latent cells.
        self.token_channels = 4 * self._vae.latent_channels
        self.cell = 2 * 2 ** (len(self._vae.block_out_channels) - 1)
        reader = self.loaded["vae_encoder"]
        assert isinstance(reader, AutoencoderKLEncoder)
        self.pictures = Flux2Pictures(reader, self._vae)

    def text_length(self, options: RequestOptions) -> int:
        """Returns the number of tokens that the language model reads, with padding."""
        assert isinstance(options, Flux2Options)
        return options.max_sequence_length or _TEXT_TOKENS

    def resolved_options(self, context: GenerationContext) -> Mapping[str, object]:
        """Returns a request's options, with the model's choices where it has none."""
        return {"max_sequence_length": self.text_length(context.options)}

    def tokenize(self, texts: PromptTexts, length: int, what: str) -> Tokenized:
        """Tokenizes each text with its template."""
        found = self._tokenizer.encode(texts.first, length)
        notes = notes_of_cuts(what, f"{length} tokens", found.removed)
        return Tokenized({"text_encoder": found.ids}, tuple(notes))

    def draw_noise(self, request: GenerationRequest, grid: Grid) -> np.ndarray:
        """Draws diffusers' noise for the seeds, float32 ``(B, S_img, 4 C)``, packed."""
        return packed_noise(request, grid, self._vae.latent_channels)

    def tables(self, context: GenerationContext) -> Mapping[str, np.ndarray]:
        """Computes both sequences' rotary tables, float32 ``(2, S, head_dim)``.

        Text counts along the last of four axes; pictures lie in the middle ones, each
        reference at a place of its own along the first.
        """
        text = np.zeros((context.text_tokens, 4), np.float32)
        text[:, 3] = np.arange(context.text_tokens)
        grids = [context.grid, *context.references]
        places = [
            image_ids(grid.rows, grid.columns, index=index * _REFERENCE_STRIDE)
            for index, grid in enumerate(grids)
        ]
        image = np.pad(np.concatenate(places), ((0, 0), (0, 1)))
        return {"text_rotary": self._rotary(text), "image_rotary": self._rotary(image)}

    def encode_text(
        self, tokens: Mapping[str, np.ndarray], context: GenerationContext
    ) -> Mapping[str, Buffer]:
        """Computes the state of every token of the prompts, and of their padding.

        The transformer attends to both, as it was trained.
        """
        encoder, given = self._text_encoder, tokens["text_encoder"]
        length = context.text_tokens
        ids = np.full((len(given), length), self._padding, np.int64)
        is_text = np.zeros(ids.shape, np.bool_)
        for row, mask, found in zip(ids, is_text, given, strict=True):
            text = found[found != NO_TOKEN]
            start = length - len(text) if encoder.pads_before else 0
            row[start : start + len(text)] = text
            mask[start : start + len(text)] = True
        return {"text": encoder.encode(ids, is_text)}

    @property
    def _text_encoder(self) -> CausalLMTextEncoder:
        encoder = self.loaded["text_encoder"]
        assert isinstance(encoder, CausalLMTextEncoder)
        return encoder

    def _rotary(self, ids: np.ndarray) -> np.ndarray:
        sizes = self._sizes
        return rotary_table(ids, sizes.axes_dims_rope, theta=sizes.rope_theta)


def empirical_mu(image_seq_len: int, num_steps: int) -> float:
    """Returns the exponent of FLUX.2's shift, as fitted by Black Forest Labs.

    Two lines in the number of image tokens, of 10 steps and of 200, and on a straight
    line between them; of images above 4300 tokens that of 200 steps.

    Args:
        image_seq_len: Image tokens that are drawn.
        num_steps: Steps of the whole schedule.
    """
    many = 0.00016927 * image_seq_len + 0.45666666
    if image_seq_len > 4300:
        return many
    few = 8.73809524e-05 * image_seq_len + 1.89833333
    slope = (many - few) / 190.0
    return slope * num_steps + (many - 200.0 * slope)
