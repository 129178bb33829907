"""The CogVideoX text-to-video pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final, final

import numpy as np
from max.driver import Buffer

from graphs.cogvideox_positions import position_table, rotary_table

from ...checkpoint import WeightTransform
from ...components import (
    T5TextEncoder,
    check_ids,
    load_t5_tokenizer,
    notes_of_cuts,
    t5_config,
)
from ...core.buffers import to_numpy
from ...core.grid import Frames, Grid
from ...core.noise import RequestNoise
from ...core.options import RequestOptions, option
from ...core.request import GenerationContext, GenerationRequest, PromptTexts
from ...errors import MaxDiffusionError, ModelLoadError, RequestError
from ...pipelines import TextToImagePipeline, Tokenized
from ...pipelines.decoding import DecodesInParts
from ...sampling import (
    DrawNoise,
    DynamicGuidance,
    RequestSampling,
    load_sampler,
)
from .config import cogvideox_config, decoder_config
from .decoder import CogVideoXDecoder, filters_by_frame
from .transformer import CogVideoXTransformer, patches_as_rows

_STEPS: Final = 50
_GUIDANCE: Final = 6.0
# In no configuration: of the model cards. 1.5 is what has patches in time.
_FPS: Final = 8.0
_FPS_OF_1_5: Final = 16.0
_MAX_FRAMES: Final = 1025


@final
@dataclass(frozen=True)
class CogVideoXOptions(RequestOptions):
    """Options that requests may set on CogVideoX only."""

    num_frames: int | None = option(
        "frames of the video, one more than a multiple of 8; default: the model's",
        minimum=1,
        maximum=_MAX_FRAMES,
    )
    fps: float | None = option(
        "frames a second of the file; default: the model's, 8 or 16",
        minimum=1,
        maximum=120,
        needs="frames",
    )
    use_dynamic_cfg: bool | None = option(
        "whether the scale of true guidance changes over the steps, as in diffusers; "
        "default: no",
        needs="guidance",
    )


@final
class CogVideoXPipeline(DecodesInParts, TextToImagePipeline):
    """Draws videos with CogVideoX (2b, 5b, 1.5, and folders of the same layout).

    | graph | purpose | calls per request |
    |---|---|---|
    | ``text_encoder`` | T5 | 1, 2 with true guidance |
    | ``transformer.full``, or its blocks one by one | denoiser | steps, branches |
    | ``weighted_sum_n``, ``relative_error`` | forecasts | by the cache |
    | ``linear_step`` or ``multistep_step``, ``guidance`` | sampler | each step |
    | ``vae.decode`` | a chunk of latents to uint8 | each chunk of each video |
    """

    components = {  # noqa: RUF012  # the documented contract is a plain class attribute
        "text_encoder": T5TextEncoder,
        "transformer": CogVideoXTransformer,
        "vae": CogVideoXDecoder,
    }
    class_names: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "scheduler": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
            "text_encoder": ("T5EncoderModel",),
            "tokenizer": ("T5Tokenizer", "T5TokenizerFast"),
            "transformer": ("CogVideoXTransformer3DModel",),
            "vae": ("AutoencoderKLCogVideoX",),
        }
    )
    options_class = CogVideoXOptions
    # The encoder's half, and the second name of T5's table.
    weight_ignores: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "vae": ("encoder.*", "quant_conv.*"),
            "text_encoder": ("shared.weight", "encoder.embed_tokens.weight"),
        }
    )
    weight_transforms: ClassVar[Mapping[str, WeightTransform]] = MappingProxyType(
        {
            "transformer": lambda config, files: files.through(patches_as_rows),
            "vae": lambda config, files: files.through(filters_by_frame),
        }
    )
    default_num_inference_steps = _STEPS
    default_true_cfg_scale = _GUIDANCE
    default_negative_prompt = ""

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Checks that the components' sizes are those of one model."""
        transformer = cogvideox_config(configs["transformer"])
        vae = decoder_config(configs["vae"])
        t5 = t5_config(configs["text_encoder"], "text_encoder")
        for what, size, owner, other in (
            (
                "latent channels",
                transformer.in_channels,
                "the vae gives",
                vae.latent_channels,
            ),
            (
                "channels of text",
                transformer.text_embed_dim,
                "the text_encoder gives",
                t5.d_model,
            ),
            (
                "frames to a latent frame",
                transformer.temporal_compression_ratio,
                "the vae gives",
                vae.temporal_compression_ratio,
            ),
        ):
            if size != other:
                raise ModelLoadError(
                    f"cogvideox: the transformer takes {size} {what}, but {owner} "
                    f"{other}; are they of one model?"
                )

    def init_remaining_components(self) -> None:
        """Loads the tokenizer and the sampler, and reads the sizes."""
        configs = self.pipeline_config.components
        folder = self.pipeline_config.path
        assert folder is not None, "CogVideoXPipeline is built by load_pipeline"
        self._tokenizer = load_t5_tokenizer(folder / "tokenizer")
        t5 = t5_config(configs["text_encoder"], "text_encoder")
        check_ids("tokenizer", self._tokenizer.vocab_size, t5.vocab_size)
        self.sampler = load_sampler(configs["scheduler"])
        sizes = self._sizes = cogvideox_config(configs["transformer"])
        self._vae = decoder_config(configs["vae"])
        self.token_channels = sizes.in_channels * sizes.patch_cells
        scale = 2 ** (len(self._vae.block_out_channels) - 1)
        self.cell = sizes.patch_size * scale
        self.default_size = sizes.sample_height * scale, sizes.sample_width * scale

    def default_sources(self) -> Mapping[str, str]:
        """Returns where the defaults come from, by the request's names."""
        return {
            "height": "transformer: sample_height",
            "width": "transformer: sample_width",
            "num_frames": "transformer: sample_frames",
            "fps": "model card",
            "num_inference_steps": "diffusers",
            "true_cfg_scale": "diffusers",
        }

    def frames_of(self, options: RequestOptions) -> Frames:
        """Returns the frames of each video.

        Raises:
            RequestError: The autoencoder cannot decode just so many.
        """
        assert isinstance(options, CogVideoXOptions)
        sizes, ratio = self._sizes, self._vae.temporal_compression_ratio
        count = options.num_frames or sizes.sample_frames
        # Of an even number of latent frames the decoder makes frames that nobody asked
        # for: the first alone makes one frame, all others as many as the ratio.
        step = 2 * ratio
        if count % step != 1:
            low = (count - 1) // step * step + 1
            near = f"{low} or {low + step}" if count > 1 else str(low)
            raise RequestError(
                f"request: num_frames must be one more than a multiple of {step}, got "
                f"{count}; nearest: {near}"
            )
        deep = sizes.frames_a_token
        fps = _FPS if sizes.patch_size_t is None else _FPS_OF_1_5
        return Frames(
            count,
            -(-self._latent_frames(count) // deep),
            fps if options.fps is None else options.fps,
        )

    def grid_of(
        self, height: int | None, width: int | None, latent_frames: int = 1
    ) -> Grid:
        """Returns the video tokens of a size in pixels.

        Raises:
            RequestError: A side that is no multiple of :attr:`cell`, or has more tokens
                than the model has positions.
        """
        sizes = self._sizes
        grid = super().grid_of(height, width, latent_frames)
        if sizes.patch_size_t is not None:
            for name, count, trained in (
                ("height", grid.rows, sizes.sample_height),
                ("width", grid.columns, sizes.sample_width),
            ):
                limit = trained // sizes.patch_size
                if count > limit:
                    raise RequestError(
                        f"request: {name} must be at most {limit * self.cell} pixels, "
                        f"where this model's positions end, got {count * self.cell}"
                    )
        side = sizes.patch_size
        return replace(grid, cells=(sizes.frames_a_token, side, side))

    def sampling_of(self, context: GenerationContext) -> RequestSampling:
        """Returns the guidance that a request asks for, and its noise at each step.

        Raises:
            MaxDiffusionError: The sampler draws noise, and the context has no seed.
        """
        assert isinstance(context.options, CogVideoXOptions)
        guidance = DynamicGuidance() if context.options.use_dynamic_cfg else None
        draws = self.sampler.needs_noise
        return RequestSampling(guidance, self._noise_after(context) if draws else None)

    def text_length(self, options: RequestOptions) -> int:
        """Returns the number of tokens that T5 reads, padding included."""
        return self._sizes.max_text_seq_length

    def resolved_options(self, context: GenerationContext) -> Mapping[str, object]:
        """Returns a request's options, with the model's choices where it has none."""
        assert isinstance(context.options, CogVideoXOptions)
        return {
            "num_frames": context.num_frames,
            **({"fps": context.fps} if context.num_frames > 1 else {}),
            "use_dynamic_cfg": bool(context.options.use_dynamic_cfg),
        }

    def tokenize(self, texts: PromptTexts, length: int, what: str) -> Tokenized:
        """Tokenizes the texts for T5."""
        batch = self._tokenizer.encode(texts.first, length)
        notes = notes_of_cuts(
            what, f"the {length} tokens of text_encoder", batch.removed
        )
        return Tokenized({"text_encoder": batch.ids}, tuple(notes))

    def draw_noise(self, request: GenerationRequest, grid: Grid) -> np.ndarray:
        """Draws diffusers' noise for the seeds, float32 ``(B, S_img, C)``, packed."""
        return self._packed(request.noise().randn(self._latent_shape(grid)))

    def _noise_after(self, context: GenerationContext) -> DrawNoise:
        """What goes on drawing where :meth:`draw_noise` ended."""
        if context.seed is None:
            raise MaxDiffusionError(
                "cogvideox: the sampler draws noise at every step, and the context has "
                "no seed; give it one"
            )
        shape = self._latent_shape(context.grid)
        seeds = context.seeds or (context.seed,)
        noise = RequestNoise(seeds, len(context.latents))
        noise.randn(shape)  # that of the latents
        return lambda: self._packed(noise.randn(shape))

    def tables(self, context: GenerationContext) -> Mapping[str, np.ndarray]:
        """Computes the rotary table of the video tokens, or what is added to them."""
        grid = context.grid
        shape = grid.frames, grid.rows, grid.columns
        if self._sizes.use_rotary_positional_embeddings:
            return {"rotary": rotary_table(self._sizes, *shape)}
        return {"positions": position_table(self._sizes, *shape)}

    def encode_text(
        self, tokens: Mapping[str, np.ndarray], context: GenerationContext
    ) -> Mapping[str, Buffer]:
        """Computes T5's state of every token."""
        t5 = self.loaded["text_encoder"]
        assert isinstance(t5, T5TextEncoder)
        return {"text": t5.encode(tokens["text_encoder"])}

    def decode_parts(
        self, context: GenerationContext, latents: Buffer
    ) -> Iterator[np.ndarray]:
        """Yields the frames of a chunk of latents, of each video one after the other.

        What convolutions hand on from chunk to chunk is held of all of them.
        """
        decoder = self.loaded["vae"]
        assert isinstance(decoder, CogVideoXDecoder)
        videos = self._unpacked(to_numpy(latents), context.grid)
        # Frames in front that only fill up the last token's.
        extra = videos.shape[1] - self._latent_frames(context.num_frames)
        chunks = [decoder.decode(video[extra:]) for video in videos]
        for parts in zip(*chunks, strict=True):
            yield np.stack(parts)

    def decode_bytes(self, height: int, width: int, num_frames: int) -> int:
        """Returns the bytes that :meth:`decode` takes while it runs."""
        decoder = self.loaded["vae"]
        assert isinstance(decoder, CogVideoXDecoder)
        frames = self._latent_frames(num_frames)
        scale = 2 ** (len(self._vae.block_out_channels) - 1)
        return decoder.decode_bytes(frames, height // scale, width // scale)

    def _latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // self._vae.temporal_compression_ratio + 1

    def _latent_shape(self, grid: Grid) -> tuple[int, ...]:
        """Of the noise of a video: frames, channels, rows and columns of latents."""
        deep, high, wide = grid.cells
        channels = self._sizes.in_channels
        return grid.frames * deep, channels, grid.rows * high, grid.columns * wide

    def _packed(self, latents: np.ndarray) -> np.ndarray:
        """``(B, F, C, h, w)`` to tokens, each by channel, frame, row and column."""
        batch, frames, channels, rows, columns = latents.shape
        side, deep = self._sizes.patch_size, self._sizes.frames_a_token
        shape = (frames // deep, deep, channels, rows // side, side)
        cells = latents.reshape(batch, *shape, columns // side, side)
        tokens = cells.transpose(0, 1, 4, 6, 3, 2, 5, 7)
        return np.ascontiguousarray(tokens.reshape(batch, -1, self.token_channels))

    def _unpacked(self, tokens: np.ndarray, grid: Grid) -> np.ndarray:
        """Tokens to ``(B, F, h, w, C)``."""
        frames, channels, rows, columns = self._latent_shape(grid)
        shape = grid.frames, grid.rows, grid.columns, channels, *grid.cells
        cells = tokens.reshape(-1, *shape).transpose(0, 1, 5, 2, 6, 3, 7, 4)
        return cells.reshape(-1, frames, rows, columns, channels)
