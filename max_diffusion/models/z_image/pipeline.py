"""The Z-Image text-to-image pipeline."""

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
    AutoencoderKLDecoder,
    TemplateTokenizer,
    autoencoder_config,
    causal_lm_config,
    check_ids,
    load_byte_level_tokenizer,
    notes_of_cuts,
)
from ...core.buffers import to_device
from ...core.grid import Grid
from ...core.noise import packed_cells
from ...core.options import RequestOptions, option
from ...core.request import GenerationContext, GenerationRequest, PromptTexts
from ...errors import ModelLoadError
from ...pipelines import Tokenized
from ...sampling import load_sampler
from ..autoencoder_pipeline import AutoencoderPipeline
from .components import ZImageTextEncoder, ZImageTransformer
from .config import text_weights, z_image_config

# The words around every prompt: Qwen3's template of a chat, thinking allowed.
_BEFORE: Final = "<|im_start|>user\n"
_AFTER: Final = "<|im_end|>\n<|im_start|>assistant\n"
_TEXT_TOKENS: Final = 512
_SIDE: Final = 1024
# Both sequences are filled up to a multiple of this many tokens.
_MULTIPLE: Final = 32
_MASKED: Final = -1e30


@final
@dataclass(frozen=True)
class ZImageOptions(RequestOptions):
    """Options that requests may set on Z-Image only."""

    max_sequence_length: int | None = option(
        "text tokens that the language model reads at most, those around the prompt "
        f"included; longer prompts are cut; default: {_TEXT_TOKENS}",
        minimum=1,
        maximum=_TEXT_TOKENS,
    )


@final
class ZImagePipeline(AutoencoderPipeline):
    """Draws with Z-Image (the first and Turbo, and folders of the same layout).

    True guidance is diffusers' ``guidance_scale`` plus 1: ``true_cfg_scale`` 6 is its
    default of 5, and 1, or 0, is Turbo's 0.

    | graph | purpose | calls per request |
    |---|---|---|
    | ``text_encoder`` | language model | 2, 1 without true guidance |
    | ``transformer.full``, or its blocks one by one | denoiser | steps, branches |
    | ``weighted_sum_n``, ``relative_error`` | forecasts | by the cache |
    | ``euler_step``, ``guidance`` | sampler | each step |
    | ``vae.decode`` | latents to uint8 | 1, or more for many images |
    """

    components = {  # noqa: RUF012  # the documented contract is a plain class attribute
        "text_encoder": ZImageTextEncoder,
        "transformer": ZImageTransformer,
        "vae": AutoencoderKLDecoder,
    }
    class_names: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
            "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
            "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
            "transformer": ("ZImageTransformer2DModel",),
            "vae": ("AutoencoderKL",),
        }
    )
    options_class = ZImageOptions
    weight_ignores: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"vae": ("encoder.*", "quant_conv.*")}
    )
    weight_transforms = MappingProxyType({"text_encoder": text_weights})
    default_num_inference_steps = 50
    default_size = _SIDE, _SIDE
    default_true_cfg_scale = 6.0
    default_negative_prompt = ""

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Checks that the components are of one model."""
        transformer = z_image_config(configs["transformer"])
        vae = autoencoder_config(configs["vae"])
        text = causal_lm_config(configs["text_encoder"])
        if transformer.in_channels != vae.latent_channels:
            raise ModelLoadError(
                f"z_image: the transformer takes {transformer.in_channels} channels, "
                f"but the vae gives {vae.latent_channels}; are they of one model?"
            )
        if transformer.cap_feat_dim != text.hidden_size:
            raise ModelLoadError(
                "z_image: the transformer reads text states of "
                f"{transformer.cap_feat_dim} channels, but text_encoder gives "
                f"{text.hidden_size}; are they of one model?"
            )

    def init_remaining_components(self) -> None:
        """Loads the tokenizer and the sampler, and reads the sizes."""
        configs = self.pipeline_config.components
        folder = self.pipeline_config.path
        assert folder is not None, "ZImagePipeline is built by load_pipeline"
        words = load_byte_level_tokenizer(folder / "tokenizer")
        self._tokenizer = TemplateTokenizer(words, _BEFORE, _AFTER)
        rows = causal_lm_config(configs["text_encoder"]).vocab_size
        check_ids("tokenizer", self._tokenizer.vocab_size, rows)
        self.sampler = load_sampler(configs["scheduler"])
        self._sizes = z_image_config(configs["transformer"])
        self._vae = autoencoder_config(configs["vae"])
        # An image token is 2 x 2 latent cells.
        self.token_channels = 4 * self._vae.latent_channels
        self.cell = 2 * 2 ** (len(self._vae.block_out_channels) - 1)

    def default_sources(self) -> Mapping[str, str]:
        """Returns where the defaults come from, by the request's names."""
        names = ("height", "width", "max_sequence_length", "num_inference_steps")
        more = ("true_cfg_scale", "negative_prompt")
        return dict.fromkeys((*names, *more), "diffusers")

    def text_length(self, options: RequestOptions) -> int:
        """Returns the most tokens that the language model reads of a prompt."""
        assert isinstance(options, ZImageOptions)
        return options.max_sequence_length or _TEXT_TOKENS

    def resolved_options(self, context: GenerationContext) -> Mapping[str, object]:
        """Returns a request's options, with the model's choices where it has none."""
        return {"max_sequence_length": self.text_length(context.options)}

    def tokenize(self, texts: PromptTexts, length: int, what: str) -> Tokenized:
        """Tokenizes each text with its template, and as long as it is."""
        found = self._tokenizer.encode(texts.first, length)
        notes = notes_of_cuts(what, f"{length} tokens", found.removed)
        longest = _filled(found.ids.shape[1])
        return Tokenized({"text_encoder": found.ids}, tuple(notes), longest)

    def draw_noise(self, request: GenerationRequest, grid: Grid) -> np.ndarray:
        """Draws diffusers' noise for the seeds, float32 ``(B, S_img, 4 C)``, packed."""
        cells = self._vae.latent_channels, 2 * grid.rows, 2 * grid.columns
        return packed_cells(request.noise().randn(cells))

    def encode_text(
        self, tokens: Mapping[str, np.ndarray], context: GenerationContext
    ) -> Mapping[str, Buffer]:
        """Computes the state of every token of the prompt, and where all tokens stand.

        Texts that are shorter than others of the request are followed by padding, which
        the transformer does not attend to; what is drawn is what each alone would give.
        """
        encoder = self.loaded["text_encoder"]
        assert isinstance(encoder, ZImageTextEncoder)
        given, grid = tokens["text_encoder"], context.grid
        counts = (given != NO_TOKEN).sum(axis=1)
        filled = np.array([_filled(int(count)) for count in counts])
        ids = np.zeros((len(given), int(filled.max())), np.int64)
        ids[:, : given.shape[1]] = np.maximum(given, 0)
        place = np.arange(ids.shape[1])
        is_filling = (place >= counts[:, None]) & (place < filled[:, None])
        missing = -grid.num_tokens % _MULTIPLE
        mask = np.zeros((len(ids), missing + ids.shape[1]), np.float32)
        mask[:, missing:][place >= filled[:, None]] = _MASKED
        text, image = self._positions(filled, ids.shape[1], grid)
        arrays = {
            "text_filling": is_filling.astype(np.float32),
            "text_mask": mask,
            "text_rotary": text,
            "image_rotary": image,
        }
        on_device = {name: to_device(x, self.device) for name, x in arrays.items()}
        return {"text": encoder.encode(ids), **on_device}

    def _positions(
        self, filled: np.ndarray, length: int, grid: Grid
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rotary tables of each sample, float32 ``(B, 2, S, head_dim)``.

        Text counts along the first axis from 1, what fills it up included, and the
        image stands after it; what fills the image up stands at 0.

        Args:
            filled: Tokens of each text, with what fills it up.
            length: The most of them.
            grid: Of the image.

        Returns:
            Of what fills the image up and the text, and of the image.
        """
        missing = -grid.num_tokens % _MULTIPLE
        text = np.zeros((missing + length, 3), np.float32)
        text[missing:, 0] = 1 + np.arange(length)
        image = image_ids(grid.rows, grid.columns)
        tables: dict[int, np.ndarray] = {}
        for count in map(int, filled):
            image[:, 0] = count + 1
            tables.setdefault(count, self._rotary(image))
        of_text = np.repeat(self._rotary(text)[None], len(filled), axis=0)
        return of_text, np.stack([tables[int(count)] for count in filled])

    def _rotary(self, ids: np.ndarray) -> np.ndarray:
        return rotary_table(ids, self._sizes.axes_dims, theta=self._sizes.rope_theta)


def _filled(count: int) -> int:
    """A number of tokens with what fills them up."""
    return -(-count // _MULTIPLE) * _MULTIPLE
