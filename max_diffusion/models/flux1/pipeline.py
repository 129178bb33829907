"""The pipelines of FLUX.1's models, which differ in what they do with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final, final

import numpy as np
from max.driver import Buffer

from graphs.rotary import image_ids, rotary_table

from ...checkpoint import PartsOfFile
from ...components import (
    AutoencoderKLDecoder,
    AutoencoderKLEncoder,
    ClipTextEncoder,
    T5TextEncoder,
    autoencoder_config,
    check_ids,
    clip_config,
    load_clip_tokenizer,
    load_t5_tokenizer,
    notes_of_cuts,
    t5_config,
)
from ...core.grid import Grid
from ...core.noise import packed_cells
from ...core.options import RequestOptions
from ...core.request import (
    GenerationContext,
    GenerationRequest,
    PromptTexts,
)
from ...errors import ModelLoadError, RequestError
from ...pipelines import Tokenized
from ...sampling import load_sampler
from ..autoencoder_pipeline import AutoencoderPipeline
from .config import flux1_config
from .files import flux1_parts
from .lora_names import LORA_NAMES
from .options import MAX_TEXT_TOKENS, Flux1KontextOptions, Flux1Options
from .pictures import (
    AbstractFlux1Pictures,
    FillPictures,
    Flux1Pictures,
    KontextPictures,
)
from .transformer import Flux1Transformer

# diffusers' default of FLUX.1-schnell, which has no guidance embedding.
_DISTILLED_STEPS: Final = 4


class AbstractFlux1Pipeline(AutoencoderPipeline):
    """Draws with a model of FLUX.1's transformer, encoders and autoencoder.

    | graph | purpose | calls per request |
    |---|---|---|
    | ``text_encoder`` | CLIP, pooled | 1, 2 with true guidance |
    | ``text_encoder_2`` | T5 | 1, 2 with true guidance |
    | ``transformer.full``, or its blocks one by one | denoiser | steps, branches |
    | ``weighted_sum_n``, ``relative_error`` | forecasts | by the cache |
    | ``euler_step``, ``guidance`` | sampler | each step |
    | ``vae.decode`` | latents to uint8 | 1, or more for many images |
    | ``vae_encoder.encode`` | picture to latents | each picture, 2 of Fill |
    | ``keep_picture`` | what a mask keeps | each step, with a mask, not of Fill |
    """

    pictures_class: ClassVar[type[AbstractFlux1Pictures]]
    """What the model does with pictures."""
    default_steps: ClassVar[int] = 28
    """diffusers' number of steps of a model with a guidance embedding."""

    components = {  # noqa: RUF012  # the documented contract is a plain class attribute
        "text_encoder": ClipTextEncoder,
        "text_encoder_2": T5TextEncoder,
        "transformer": Flux1Transformer,
        "vae": AutoencoderKLDecoder,
    }
    picture_components = {"vae_encoder": ("vae", AutoencoderKLEncoder)}  # noqa: RUF012
    class_names: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("T5EncoderModel",),
            "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "tokenizer_2": ("T5TokenizerFast", "T5Tokenizer"),
            "transformer": ("FluxTransformer2DModel",),
            "vae": ("AutoencoderKL",),
        }
    )
    options_class = Flux1Options
    has_second_text = True
    lora_names = LORA_NAMES
    parts_of_file: ClassVar[PartsOfFile | None] = staticmethod(flux1_parts)
    # The other half of the autoencoder, and buffers that checkpoints hold.
    weight_ignores: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "vae": ("encoder.*", "quant_conv.*"),
            "vae_encoder": ("decoder.*", "post_quant_conv.*"),
            "text_encoder": ("*position_ids", "text_projection.weight"),
            "text_encoder_2": ("shared.weight", "encoder.embed_tokens.weight"),
        }
    )

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Checks that the transformer's channels are those of the autoencoder."""
        transformer = flux1_config(configs["transformer"])
        vae = autoencoder_config(configs["vae"])
        latents = 4 * vae.latent_channels
        known = cls.pictures_class.known_channels(vae)
        taken, drawn = transformer.in_channels, transformer.out_channels
        if (taken, drawn) != (latents + known, latents):
            wanted = f"4 * {vae.latent_channels}" + (f" + {known}" if known else "")
            raise ModelLoadError(
                f"flux1: the transformer takes {taken} channels and gives {drawn}, but "
                f"with this vae {cls.__name__} takes {wanted} and gives 4 * "
                f"{vae.latent_channels}; are they of one model, and does "
                "model_index.json name the model's own pipeline?"
            )

    def init_remaining_components(self) -> None:
        """Loads the tokenizers and the sampler, and reads the sizes."""
        configs = self.pipeline_config.components
        folder = self.pipeline_config.path
        assert folder is not None, "a FLUX.1 pipeline is built by load_pipeline"
        clip, t5 = (
            clip_config(configs["text_encoder"]),
            t5_config(configs["text_encoder_2"]),
        )
        self._clip_tokenizer = load_clip_tokenizer(folder / "tokenizer")
        self._t5_tokenizer = load_t5_tokenizer(folder / "tokenizer_2")
        check_ids("tokenizer", self._clip_tokenizer.vocab_size, clip.vocab_size)
        check_ids("tokenizer_2", self._t5_tokenizer.vocab_size, t5.vocab_size)
        positions = clip.max_position_embeddings
        limit = self._clip_tokenizer.model_max_length
        if limit > positions:
            raise ModelLoadError(
                f"tokenizer: its limit of {limit} tokens is above the {positions} "
                "positions of text_encoder; are they of one model?"
            )
        self._text_limit = min(self._t5_tokenizer.model_max_length, MAX_TEXT_TOKENS)
        self.sampler = load_sampler(configs["scheduler"])
        self._sizes = flux1_config(configs["transformer"])
        self._vae = autoencoder_config(configs["vae"])
        # An image token is 2 x 2 latent cells.
        self.token_channels = 4 * self._vae.latent_channels
        self.cell = 2 * 2 ** (len(self._vae.block_out_channels) - 1)
        side = int(configs["vae"].get("sample_size", 1024))
        self.default_size = side, side
        encoder = self.loaded["vae_encoder"]
        assert isinstance(encoder, AutoencoderKLEncoder)
        self.pictures = self.pictures_class(encoder, self._vae)
        self.has_guidance = self._sizes.guidance_embeds
        self.default_num_inference_steps = (
            self.default_steps if self.has_guidance else _DISTILLED_STEPS
        )

    def default_sources(self) -> Mapping[str, str]:
        """Returns where the defaults come from, by the request's names."""
        has_size = "sample_size" in self.pipeline_config.components["vae"]
        size = "vae: sample_size" if has_size else "diffusers"
        kind = "with" if self.has_guidance else "without"
        has_own_limit = self._text_limit < MAX_TEXT_TOKENS
        sources = {
            "height": size,
            "width": size,
            "max_sequence_length": (
                "tokenizer_2: model_max_length" if has_own_limit else "diffusers"
            ),
            "num_inference_steps": f"model {kind} guidance embedding",
        }
        if self.has_guidance:
            sources["guidance_scale"] = "diffusers"
        return sources

    def text_length(self, options: RequestOptions) -> int:
        """Returns the number of tokens that T5 reads, padding included."""
        assert isinstance(options, Flux1Options)
        asked = options.max_sequence_length
        if asked is None:
            return self._text_limit
        if asked > self._text_limit:
            raise RequestError(
                f"request: max_sequence_length must be 1 to {self._text_limit} for "
                f"this model, got {asked}"
            )
        return asked

    def resolved_options(self, context: GenerationContext) -> Mapping[str, object]:
        """Returns a request's options, with the model's choices where it has none."""
        given = {k: v for k, v in vars(context.options).items() if v is not None}
        return {**given, "max_sequence_length": context.text_tokens}

    def tokenize(self, texts: PromptTexts, length: int, what: str) -> Tokenized:
        """Tokenizes the first texts for CLIP and the second ones for T5."""
        clip_length = self._clip_tokenizer.model_max_length
        clip = self._clip_tokenizer.encode(texts.first, clip_length)
        t5 = self._t5_tokenizer.encode(texts.second, length)
        notes = [
            *notes_of_cuts(
                what, f"the {clip_length} tokens of text_encoder", clip.removed
            ),
            *notes_of_cuts(what, f"the {length} tokens of text_encoder_2", t5.removed),
        ]
        ids = {"text_encoder": clip.ids, "text_encoder_2": t5.ids}
        return Tokenized(ids, tuple(notes))

    def draw_noise(self, request: GenerationRequest, grid: Grid) -> np.ndarray:
        """Draws diffusers' noise for the seeds, float32 ``(B, S_img, 4 C)``, packed."""
        cells = self._vae.latent_channels, 2 * grid.rows, 2 * grid.columns
        return packed_cells(request.noise().randn(cells))

    def tables(self, context: GenerationContext) -> Mapping[str, np.ndarray]:
        """Computes both sequences' rotary tables, float32 ``(2, S, head_dim)``."""
        axes = self._sizes.axes_dims_rope
        text = np.zeros((context.text_tokens, 3), np.float32)
        ids = [image_ids(context.grid.rows, context.grid.columns)]
        ids += [image_ids(x.rows, x.columns, index=1) for x in context.references]
        return {
            "text_rotary": rotary_table(text, axes),
            "image_rotary": rotary_table(np.concatenate(ids), axes),
        }

    def encode_text(
        self, tokens: Mapping[str, np.ndarray], context: GenerationContext
    ) -> Mapping[str, Buffer]:
        """Computes T5's state of every token, and CLIP's pooled vector."""
        clip, t5 = self.loaded["text_encoder"], self.loaded["text_encoder_2"]
        assert isinstance(clip, ClipTextEncoder)
        assert isinstance(t5, T5TextEncoder)
        return {
            "text": t5.encode(tokens["text_encoder_2"]),
            "pooled_text": clip.encode(tokens["text_encoder"]),
        }


@final
class Flux1Pipeline(AbstractFlux1Pipeline):
    """FLUX.1 dev, schnell, and folders of the same layout.

    A picture is where noise is added to, and what a mask leaves out of it is put back.
    """

    pictures_class = Flux1Pictures


@final
class Flux1KontextPipeline(AbstractFlux1Pipeline):
    """FLUX.1-Kontext: edits a picture as the prompt says, or draws without one.

    The picture's tokens follow those that are drawn through all blocks.
    """

    pictures_class = KontextPictures
    options_class = Flux1KontextOptions


@final
class Flux1FillPipeline(AbstractFlux1Pipeline):
    """FLUX.1-Fill: draws within the mask of a picture, so that it fits the rest.

    Its transformer reads more channels than it predicts.
    """

    pictures_class = FillPictures
    needs_pictures = True
    default_steps = 50
    default_guidance_scale = 30.0
