"""The Qwen-Image text-to-image pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, final

import numpy as np
from max.driver import Buffer

from graphs.rotary import image_ids, rotary_table

from ...components import (
    NO_TOKEN,
    TemplateTokenizer,
    causal_lm_config,
    causal_lm_weights,
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
from ...pipelines import TextToImagePipeline, Tokenized
from ...sampling import RescaledGuidance, load_sampler
from .components import (
    NUM_DROPPED,
    QwenImageDecoder,
    QwenImageTextEncoder,
    QwenImageTransformer,
)
from .config import decoder_config, picture_weights, qwen_image_config

# The words that the model was trained with, around every prompt.
_BEFORE: Final = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, "
    "texture, quantity, text, spatial relationships of the objects and background:"
    "<|im_end|>\n<|im_start|>user\n"
)
_AFTER: Final = "<|im_end|>\n<|im_start|>assistant\n"
_TEXT_TOKENS: Final = 512
_MOST_TEXT_TOKENS: Final = 1024
# Of the model card.
_SIDE: Final = 1328
_MASKED: Final = -1e30


@final
@dataclass(frozen=True)
class QwenImageOptions(RequestOptions):
    """Options that requests may set on Qwen-Image only."""

    max_sequence_length: int | None = option(
        "text tokens that the transformer reads at most; longer prompts are cut, "
        f"shorter ones not padded; default: {_TEXT_TOKENS}",
        minimum=1,
        maximum=_MOST_TEXT_TOKENS,
    )


@final
class QwenImagePipeline(TextToImagePipeline):
    """Draws with Qwen-Image (the first and 2512, and folders of the same layout).

    | graph | purpose | calls per request |
    |---|---|---|
    | ``text_encoder`` | language model | 2, 1 without true guidance |
    | ``transformer.full``, or its blocks one by one | denoiser | steps, branches |
    | ``weighted_sum_n``, ``relative_error`` | forecasts | by the cache |
    | ``euler_step``, ``rescaled_guidance`` | sampler | each step |
    | ``vae.decode`` | latents to uint8 | 1, or more for many images |
    """

    components = {  # noqa: RUF012  # the documented contract is a plain class attribute
        "text_encoder": QwenImageTextEncoder,
        "transformer": QwenImageTransformer,
        "vae": QwenImageDecoder,
    }
    class_names: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
            "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
            "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
            "transformer": ("QwenImageTransformer2DModel",),
            "vae": ("AutoencoderKLQwenImage",),
        }
    )
    options_class = QwenImageOptions
    # What encodes pictures, and what lies between the frames of a video.
    weight_ignores: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"vae": ("encoder.*", "quant_conv.*", "*.time_conv.*")}
    )
    weight_transforms = MappingProxyType(
        {"text_encoder": causal_lm_weights, "vae": picture_weights}
    )
    default_num_inference_steps = 50
    default_size = _SIDE, _SIDE
    default_true_cfg_scale = 4.0
    # Nothing, as the model card says it: not an empty text.
    default_negative_prompt = " "

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Checks that the components are of one model."""
        transformer = qwen_image_config(configs["transformer"])
        vae = decoder_config(configs["vae"])
        text = causal_lm_config(configs["text_encoder"])
        predicted = transformer.patch_size**2 * transformer.out_channels
        if not transformer.in_channels == predicted == 4 * vae.z_dim:
            raise ModelLoadError(
                f"qwen_image: the transformer takes {transformer.in_channels} channels "
                f"and gives {predicted}, but the vae has 4 * {vae.z_dim}; are they of "
                "one model?"
            )
        if transformer.joint_attention_dim != text.hidden_size:
            raise ModelLoadError(
                "qwen_image: the transformer reads text states of "
                f"{transformer.joint_attention_dim} channels, but text_encoder gives "
                f"{text.hidden_size}; are they of one model?"
            )

    def init_remaining_components(self) -> None:
        """Loads the tokenizer and the sampler, and reads the sizes."""
        configs = self.pipeline_config.components
        folder = self.pipeline_config.path
        assert folder is not None, "QwenImagePipeline is built by load_pipeline"
        words = load_byte_level_tokenizer(folder / "tokenizer")
        self._tokenizer = TemplateTokenizer(words, _BEFORE, _AFTER)
        rows = causal_lm_config(configs["text_encoder"]).vocab_size
        check_ids("tokenizer", self._tokenizer.vocab_size, rows)
        shortest = self._tokenizer.encode([""], 2 * _MOST_TEXT_TOKENS).ids.shape[1]
        if shortest <= NUM_DROPPED:
            raise ModelLoadError(
                f"tokenizer: an empty prompt in its template is {shortest} tokens, and "
                f"the first {NUM_DROPPED} are left out; is it Qwen's?"
            )
        self.sampler = load_sampler(configs["scheduler"])
        self.guidance = RescaledGuidance()
        self._sizes = qwen_image_config(configs["transformer"])
        self._vae = decoder_config(configs["vae"])
        # An image token is 2 x 2 latent cells.
        self.token_channels = 4 * self._vae.z_dim
        self.cell = 2 * 2 ** (len(self._vae.dim_mult) - 1)

    def default_sources(self) -> Mapping[str, str]:
        """Returns where the defaults come from, by the request's names."""
        return {
            "height": "model card",
            "width": "model card",
            "max_sequence_length": "diffusers",
            "num_inference_steps": "diffusers",
            "true_cfg_scale": "diffusers",
            "negative_prompt": "model card",
        }

    def text_length(self, options: RequestOptions) -> int:
        """Returns the most tokens that the transformer reads of a prompt."""
        assert isinstance(options, QwenImageOptions)
        return options.max_sequence_length or _TEXT_TOKENS

    def resolved_options(self, context: GenerationContext) -> Mapping[str, object]:
        """Returns a request's options, with the model's choices where it has none."""
        return {"max_sequence_length": self.text_length(context.options)}

    def tokenize(self, texts: PromptTexts, length: int, what: str) -> Tokenized:
        """Tokenizes each text with its template, and as long as it is."""
        found = self._tokenizer.encode(texts.first, NUM_DROPPED + length)
        notes = notes_of_cuts(what, f"{length} tokens", found.removed)
        longest = found.ids.shape[1] - NUM_DROPPED
        return Tokenized({"text_encoder": found.ids}, tuple(notes), longest)

    def draw_noise(self, request: GenerationRequest, grid: Grid) -> np.ndarray:
        """Draws diffusers' noise for the seeds, float32 ``(B, S_img, 4 C)``, packed."""
        cells = self._vae.z_dim, 2 * grid.rows, 2 * grid.columns
        return packed_cells(request.noise().randn(cells))

    def tables(self, context: GenerationContext) -> Mapping[str, np.ndarray]:
        """Computes the image's rotary table, float32 ``(2, S_img, head_dim)``."""
        grid = context.grid
        ids = image_ids(grid.rows, grid.columns, is_centred=True)
        return {"image_rotary": self._rotary(ids)}

    def encode_text(
        self, tokens: Mapping[str, np.ndarray], context: GenerationContext
    ) -> Mapping[str, Buffer]:
        """Computes the state of every token of the prompt, and where each stands.

        Texts that are shorter than others of the request are followed by padding, which
        the transformer does not attend to; what is drawn is what each alone would give.
        """
        encoder = self.loaded["text_encoder"]
        assert isinstance(encoder, QwenImageTextEncoder)
        ids, grid = tokens["text_encoder"], context.grid
        is_padding = ids[:, NUM_DROPPED:] == NO_TOKEN
        mask = np.where(is_padding, np.float32(_MASKED), np.float32(0))
        # Along all axes, from where the image ends.
        places = max(grid.rows // 2, grid.columns // 2) + np.arange(mask.shape[1])
        table = self._rotary(np.repeat(places[:, None], 3, axis=1))
        return {
            "text": encoder.encode(np.maximum(ids, 0)),
            "text_mask": to_device(mask, self.device),
            "text_rotary": to_device(table, self.device),
        }

    def decode(self, context: GenerationContext, latents: Buffer) -> np.ndarray:
        """Decodes ``(B, S_img, C)`` to uint8 ``(B, 1, H, W, 3)``, in one go."""
        decoder = self.loaded["vae"]
        assert isinstance(decoder, QwenImageDecoder)
        return decoder.frames(latents, context.grid)

    def decode_bytes(self, height: int, width: int, num_frames: int) -> int:
        """Returns the bytes that :meth:`decode` takes per image while it runs.

        At its widest, a residual block holds its input, its inner tensor, that one's
        norm and its output, all of its output's channels and in float32 at most. Half
        as much again is counted for what MAX keeps from one run to the next.
        """
        widths = self._vae.widths[::-1]
        channels = max(4 * size / 4**level for level, size in enumerate(widths))
        size = 4 if self.device.is_host else self.dtype.size_in_bytes
        a_pixel = math.ceil(channels * size) + 4 * 3 + 2 * 3
        return num_frames * height * width * a_pixel * 3 // 2

    def _rotary(self, ids: np.ndarray) -> np.ndarray:
        return rotary_table(ids, self._sizes.axes_dims_rope, dtype=np.float32)
