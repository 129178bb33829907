"""The FLUX.1 text-to-image pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, final

import numpy as np
from max.driver import Buffer

from graphs.flux1 import image_ids, rotary_table

from ...buffers import repeat_rows, to_device, to_numpy
from ...caches import Run
from ...checkpoint import ModelFolder
from ...denoising import Branch
from ...errors import ModelLoadError, RequestError
from ...loop import Denoising
from ...noise import TorchCpuGenerator
from ...schedulers import Schedule, load_scheduler
from ...text_to_image import TextToImagePipeline
from ...tokenizers import load_clip_tokenizer, load_t5_tokenizer
from ...types import GenerationContext, GenerationRequest
from .components import (
    AutoencoderKLDecoder,
    ClipTextEncoder,
    Flux1Transformer,
    T5TextEncoder,
)
from .config import autoencoder_config, clip_config, flux1_config, t5_config

# Longest T5 input the published models were trained on, and that diffusers allows.
_MAX_TEXT_TOKENS = 512
# diffusers draws in 28 steps. Models without guidance embedding are distilled to few
# (FLUX.1-schnell: 1 to 4), and its documentation draws them in 4.
_STEPS, _DISTILLED_STEPS = 28, 4
_GUIDANCE = 3.5


@dataclass(frozen=True)
class Flux1Inputs:
    """A request on the device."""

    latents: Buffer
    """Packed noise, float32 ``(B, S_img, C)``."""
    tokens: np.ndarray
    """CLIP ids, int64 ``(P, S)``; on the host."""
    tokens_2: np.ndarray
    """T5 ids, int64 ``(P, S_txt)``; on the host."""
    negative_tokens: np.ndarray | None
    negative_tokens_2: np.ndarray | None
    text_rotary: Buffer
    """float32 ``(2, S_txt, head_dim)``."""
    image_rotary: Buffer
    """float32 ``(2, S_img, head_dim)``."""
    context: GenerationContext


@final
class Flux1Pipeline(TextToImagePipeline):
    """FLUX.1 (dev, schnell, and folders of the same layout).

    | graph | purpose | calls per request |
    |---|---|---|
    | ``text_encoder`` | CLIP, pooled | 1, 2 with true guidance |
    | ``text_encoder_2`` | T5 | 1, 2 with true guidance |
    | ``full``, or ``embed``, ``block_i``, ``output`` | denoiser | steps, branches |
    | ``weighted_sum_n``, ``relative_error`` | forecasts | by the cache |
    | ``euler_step``, ``guidance`` | sampler | each step |
    | ``decode`` | latents to uint8 | 1 |
    """

    components = {  # noqa: RUF012  # the documented contract is a plain class attribute
        "text_encoder": ClipTextEncoder,
        "text_encoder_2": T5TextEncoder,
        "transformer": Flux1Transformer,
        "vae": AutoencoderKLDecoder,
    }
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
    # Encoder halves and buffers that checkpoints hold and text-to-image does not use.
    weight_ignores: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "vae": ("encoder.*", "quant_conv.*"),
            "text_encoder": ("*position_ids", "text_projection.weight"),
            "text_encoder_2": ("shared.weight", "encoder.embed_tokens.weight"),
        }
    )

    @classmethod
    def component_configs(cls, folder: ModelFolder) -> dict[str, dict[str, Any]]:
        """Every component's ``config.json``, with the shape worth a static graph."""
        for role, names in cls.class_names.items():
            folder.require(role, names)
        configs = {role: folder.config(role) for role in cls.components}
        transformer = flux1_config(configs["transformer"])
        vae = autoencoder_config(configs["vae"])
        if transformer.in_channels != 4 * vae.latent_channels:
            raise ModelLoadError(
                f"flux1: the transformer takes {transformer.in_channels} channels, but "
                f"the vae gives 4 * {vae.latent_channels}; are they of one model?"
            )
        configs["scheduler"] = folder.config("scheduler")
        return configs

    @classmethod
    def token_counts(
        cls,
        folder: ModelFolder,
        configs: Mapping[str, Mapping[str, Any]],
        height: int | None,
        width: int | None,
    ) -> tuple[int, int]:
        """Image tokens of a picture's size, and the most text tokens."""
        cell = 2 * _scale(autoencoder_config(configs["vae"]))
        sizes = _sizes(cell, _default_size(configs["vae"]), height, width)
        text = load_t5_tokenizer(folder.path / "tokenizer_2").model_max_length
        return sizes[0] // cell * (sizes[1] // cell), min(text, _MAX_TEXT_TOKENS)

    def init_remaining_components(self) -> None:
        """Tokenizers, scheduler and sizes."""
        configs = self.pipeline_config.components
        folder = self.pipeline_config.path
        assert folder is not None, "Flux1Pipeline is built by load_pipeline"
        self._clip_tokenizer = load_clip_tokenizer(folder / "tokenizer")
        self._t5_tokenizer = load_t5_tokenizer(folder / "tokenizer_2")
        clip = clip_config(configs["text_encoder"])
        t5 = t5_config(configs["text_encoder_2"])
        for role, tokenizer, rows in (
            ("tokenizer", self._clip_tokenizer, clip.vocab_size),
            ("tokenizer_2", self._t5_tokenizer, t5.vocab_size),
        ):
            # Ids beyond the table would be read from other memory.
            if tokenizer.vocab_size > rows:
                raise ModelLoadError(
                    f"{role}: its {tokenizer.vocab_size} ids are more than the {rows} "
                    "of the text encoder; are they of one model?"
                )
        positions = clip.max_position_embeddings
        limit = self._clip_tokenizer.model_max_length
        if limit > positions:
            raise ModelLoadError(
                f"tokenizer: its limit of {limit} tokens is above the {positions} "
                "positions of text_encoder; are they of one model?"
            )
        self._scheduler = load_scheduler(configs["scheduler"])
        self._transformer = flux1_config(configs["transformer"])
        vae = autoencoder_config(configs["vae"])
        self._latent_channels = vae.latent_channels
        self._decoded_widths = vae.block_out_channels
        self._cell = 2 * _scale(vae)
        self._default_size = _default_size(configs["vae"])
        self._size_source = (
            "vae: sample_size" if "sample_size" in configs["vae"] else ("diffusers")
        )
        self.has_guidance = self._transformer.guidance_embeds
        self.default_num_inference_steps = (
            _STEPS if self.has_guidance else _DISTILLED_STEPS
        )

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of a picture whose size is not given."""
        return self._default_size, self._default_size

    def create_context(self, request: GenerationRequest) -> GenerationContext:
        """Tokenizes, draws the noise and lays out the schedule; no device work.

        Raises:
            RequestError: A size that is no multiple of the model's step, or more text
                tokens than the model reads.
        """
        sizes = request.height, request.width
        height, width = _sizes(self._cell, self._default_size, *sizes)
        rows, columns = height // self._cell, width // self._cell
        steps = request.num_inference_steps
        if steps is None and request.sigmas is None:
            steps = self.default_num_inference_steps
        schedule = self._scheduler.schedule(
            steps, image_seq_len=rows * columns, sigmas=request.sigmas
        )
        cache = self.cache_config
        if request.cache is not None:
            cache = self.resolve_cache(request.cache)
        length = self._text_length(request.max_sequence_length)
        has_negative = (
            request.true_cfg_scale > 1 and request.negative_prompt is not None
        )
        known = Run(
            schedule.num_steps,
            tuple(float(timestep) for timestep in schedule.timesteps),
            grid=(rows, columns),
            has_guidance=has_negative,
        )
        warnings = (*self._guidance_warnings(request), *self.cache_notes(cache, known))
        tokens, tokens_2, notes = self._tokenize(
            request.prompts, request.second_prompts, length, "prompt"
        )
        first = second = None
        if has_negative:
            first, second, more = self._negative_tokens(request, length)
            notes += more
        latent_bytes = 4 * 4 * self._latent_channels * rows * columns
        self.check_room(request.num_pictures, height, width, latent_bytes)
        if request.cache_memory_limit is not None:
            self.check_cache_memory(
                cache,
                request.cache_memory_limit,
                (request.num_pictures, rows * columns, length),
                branches=2 if has_negative else 1,
            )
        return GenerationContext(
            tokens=tokens,
            tokens_2=tokens_2,
            negative_tokens=first,
            negative_tokens_2=second,
            latents=self._noise(request, 2 * rows, 2 * columns),
            sigmas=schedule.sigmas,
            timesteps=schedule.timesteps,
            height=height,
            width=width,
            num_inference_steps=schedule.num_steps,
            guidance_scale=self._guidance(request),
            true_cfg_scale=request.true_cfg_scale,
            num_images_per_prompt=request.num_images_per_prompt,
            seed=request.seed,
            warnings=(*warnings, *notes),
            cache=request.cache,
            defaults=self._defaults(request),
        )

    def prepare_inputs(self, context: GenerationContext) -> Flux1Inputs:
        """Noise and rotary tables to the device."""
        axes = self._transformer.axes_dims_rope
        text_len = context.tokens_2.shape[1]
        grid = image_ids(*self._grid(context))
        text_table = rotary_table(np.zeros((text_len, 3), np.float32), axes)
        return Flux1Inputs(
            latents=to_device(context.latents, self.device),
            tokens=context.tokens,
            tokens_2=context.tokens_2,
            negative_tokens=context.negative_tokens,
            negative_tokens_2=context.negative_tokens_2,
            text_rotary=to_device(text_table, self.device),
            image_rotary=to_device(rotary_table(grid, axes), self.device),
            context=context,
        )

    def encode(self, model_inputs: Flux1Inputs) -> Denoising:
        """Runs CLIP and T5 on the prompts, and on the negative one."""
        context = model_inputs.context
        branches = [
            self._branch(
                "conditional", model_inputs, model_inputs.tokens, model_inputs.tokens_2
            )
        ]
        negative, negative_2 = (
            model_inputs.negative_tokens,
            model_inputs.negative_tokens_2,
        )
        if negative is not None and negative_2 is not None:
            branches.append(
                self._branch("unconditional", model_inputs, negative, negative_2)
            )
        return self.begin(
            model_inputs.latents,
            Schedule(context.sigmas, context.timesteps),
            branches,
            true_cfg_scale=context.true_cfg_scale,
            cache=context.cache,
            grid=self._grid(context),
        )

    def decode(self, context: GenerationContext, latents: Buffer) -> np.ndarray:
        """Latents ``(B, S_img, C)`` to pictures, uint8 ``(B, H, W, 3)``, in one go."""
        decoder = self.loaded["vae"]
        assert isinstance(decoder, AutoencoderKLDecoder)
        return to_numpy(decoder.decode(latents, *self._grid(context))).copy()

    def decode_bytes(self, height: int, width: int) -> int:
        """Bytes that :meth:`decode` takes for each picture while it runs.

        At its widest, a residual block holds three tensors of its input's channels and
        one of its output's, in float32 on CPU. For the demo model these and the picture
        are 478 bytes a pixel, where 469 were measured; half as much again is kept by
        MAX from one run to the next (1.47 times at 1024 x 1024, no more after three).
        """
        widths = self._decoded_widths
        entering = (*widths[1:], widths[-1])
        channels = max(
            (3 * before + after) / 4**level
            for level, (before, after) in enumerate(zip(entering, widths, strict=True))
        )
        size = 4 if self.device.is_host else self.dtype.size_in_bytes
        a_pixel = math.ceil(channels * size) + 4 * 3 + 2 * 3
        return height * width * a_pixel * 3 // 2

    def _grid(self, context: GenerationContext) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return context.height // self._cell, context.width // self._cell

    def _branch(
        self,
        name: str,
        inputs: Flux1Inputs,
        tokens: np.ndarray,
        tokens_2: np.ndarray,
    ) -> Branch:
        clip, t5 = self.loaded["text_encoder"], self.loaded["text_encoder_2"]
        assert isinstance(clip, ClipTextEncoder)
        assert isinstance(t5, T5TextEncoder)
        count = inputs.context.num_images_per_prompt
        held = {
            "text": t5.encode(repeat_rows(tokens_2, count)),
            "pooled_text": clip.encode(repeat_rows(tokens, count)),
            "text_rotary": inputs.text_rotary,
            "image_rotary": inputs.image_rotary,
        }
        if self.has_guidance:
            batch = len(tokens) * count
            scale = np.full(batch, inputs.context.guidance_scale, np.float32)
            held["guidance"] = to_device(scale, self.device)
        return Branch(name, held)

    def _tokenize(
        self, texts: Sequence[str], texts_2: Sequence[str], length: int, what: str
    ) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Ids of both tokenizers, and what was cut off."""
        clip_length = self._clip_tokenizer.model_max_length
        clip = self._clip_tokenizer.encode(texts, clip_length)
        t5 = self._t5_tokenizer.encode(texts_2, length)
        notes = [
            f"{what} {index + 1} is longer than the {limit} tokens of {encoder} and "
            f"was cut; not seen: {_shortened(text)}"
            for encoder, limit, batch in (
                ("text_encoder", clip_length, clip),
                ("text_encoder_2", length, t5),
            )
            for index, text in enumerate(batch.removed)
            if text
        ]
        return clip.ids, t5.ids, tuple(notes)

    def _negative_tokens(
        self, request: GenerationRequest, length: int
    ) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """The same of the negative prompts; one of all prompts is read once."""
        texts, texts_2 = request.negative_prompts, request.second_negative_prompts
        assert texts is not None and texts_2 is not None
        count = len(texts) if len({*zip(texts, texts_2, strict=True)}) > 1 else 1
        first, second, notes = self._tokenize(
            texts[:count], texts_2[:count], length, "the negative prompt"
        )
        if count < len(texts):
            first, second = (repeat_rows(x, len(texts)) for x in (first, second))
        return first, second, notes

    def _text_length(self, asked: int | None) -> int:
        """Tokens of the second text encoder."""
        limit = min(self._t5_tokenizer.model_max_length, _MAX_TEXT_TOKENS)
        if asked is not None and asked > limit:
            raise RequestError(
                f"flux1: max_sequence_length must be 1 to {limit} for this model, got "
                f"{asked}"
            )
        return limit if asked is None else asked

    def _guidance(self, request: GenerationRequest) -> float:
        """What the guidance embedding is told; 0 where there is none."""
        if not self.has_guidance:
            return 0.0
        return _GUIDANCE if request.guidance_scale is None else request.guidance_scale

    def _defaults(self, request: GenerationRequest) -> dict[str, str]:
        """Where settings come from that a request leaves open."""
        kind = "with" if self.has_guidance else "without"
        has_own_limit = self._t5_tokenizer.model_max_length < _MAX_TEXT_TOKENS
        sources = {
            "height": self._size_source,
            "width": self._size_source,
            "max_sequence_length": (
                "tokenizer_2: model_max_length" if has_own_limit else "diffusers"
            ),
        }
        if request.sigmas is None:
            sources["num_inference_steps"] = f"model {kind} guidance embedding"
        if self.has_guidance:
            sources["guidance_scale"] = "diffusers"
        return {
            name: source
            for name, source in sources.items()
            if getattr(request, name) is None
        }

    def _guidance_warnings(self, request: GenerationRequest) -> tuple[str, ...]:
        found = []
        # 0 is how FLUX.1-schnell is called everywhere, and up to 1 no guidance is asked
        # for. More is kept from a script for another model: the picture is diffusers',
        # which ignores it, but not what was asked for.
        scale = request.guidance_scale
        if scale is not None and scale > 1 and not self.has_guidance:
            found.append(
                f"a guidance scale of {scale:g} has no effect: this model has no "
                "guidance embedding; leave it out, or use true guidance"
            )
        if request.true_cfg_scale > 1 and request.negative_prompt is None:
            found.append(
                "true guidance has no effect without a negative prompt; give one, it "
                "may be empty"
            )
        elif request.true_cfg_scale <= 1 and request.negative_prompt is not None:
            found.append(
                "the negative prompt has no effect unless true guidance is above 1"
            )
        if request.negative_prompt is None and request.negative_prompt_2 is not None:
            found.append(
                "the second negative prompt has no effect without a negative prompt"
            )
        return tuple(found)

    def _noise(self, request: GenerationRequest, height: int, width: int) -> np.ndarray:
        """Diffusers' noise for the seeds, packed: float32 ``(B, S_img, 4 C)``."""
        batch, channels = request.num_pictures, self._latent_channels
        size = (channels, height, width)
        if request.seeds is None:
            noise = TorchCpuGenerator(request.seed).randn((batch, *size))
        else:
            each = [TorchCpuGenerator(seed).randn((1, *size)) for seed in request.seeds]
            noise = np.concatenate(each)
        cells = noise.reshape(batch, channels, height // 2, 2, width // 2, 2)
        packed = cells.transpose(0, 2, 4, 1, 3, 5)
        return np.ascontiguousarray(packed.reshape(batch, -1, channels * 4))


def _sizes(
    cell: int, default: int, height: int | None, width: int | None
) -> tuple[int, int]:
    """Height and width in pixels, if they are multiples of ``cell``."""
    sizes = []
    for name, value in (("height", height), ("width", width)):
        size = default if value is None else value
        if size % cell or size < cell:
            low = size // cell * cell
            near = [str(n) for n in (low, low + cell) if n]
            raise RequestError(
                f"flux1: {name} must be a multiple of {cell} pixels, got {size}; "
                f"nearest: {' or '.join(near)}"
            )
        sizes.append(size)
    return sizes[0], sizes[1]


def _default_size(vae: Mapping[str, Any]) -> int:
    return int(vae.get("sample_size", 1024))


def _scale(vae: Any) -> int:
    """Pixels per latent cell."""
    return int(2 ** (len(vae.block_out_channels) - 1))


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
