"""Text to image: the short way in, on top of the documented contract.

A model family says what is its own in small steps, named below; everything that a
request goes through on its way from texts to images is here, once.
"""

from __future__ import annotations

import secrets
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from max.driver import Buffer

from ..caches import (
    AbstractCacheConfig,
    DenoisingCacheConfig,
)
from ..checkpoint import ModelFolder, PartsOfFile, WeightTransform
from ..checkpoint.lora import LoraNaming
from ..core.buffers import to_device
from ..core.grid import Frames, Grid
from ..core.loras import GivenLoras, as_loras
from ..core.options import RequestOptions
from ..core.request import (
    GenerationContext,
    GenerationRequest,
    PromptTexts,
)
from ..core.validation import as_texts, as_tuple
from ..denoising import Denoising
from ..errors import RequestError
from ..execution.compiler import memory_errors_said
from ..sampling import RequestSampling, Schedule
from .adapters import adapted
from .arguments import picture_inputs
from .branches import text_branch
from .context import Tokenized, make_context
from .decoding import decode_in_goes
from .generation_defaults import GenerationDefaults
from .outputs import (
    DiffusionPipelineOutput,
    GenerationInputs,
    GenerationResult,
    OnStep,
)
from .pipeline import DiffusionPipeline
from .reporting import report_of
from .starting import AbstractPictures, Begun, begin_from_pictures

if TYPE_CHECKING:
    from ..media.pictures import PictureLike

_MAX_SEED = 2**32


class TextToImagePipeline(DiffusionPipeline):
    """A pipeline that ``load_pipeline`` can build and ``generate`` can drive.

    A subclass names its components and the classes that a model folder may have for
    them, sets :attr:`cell`, :attr:`default_size` and what else differs in
    :meth:`init_remaining_components`, and writes :meth:`tokenize`, :meth:`text_length`,
    :meth:`draw_noise`, :meth:`encode_text`, :meth:`decode` and :meth:`decode_bytes`.
    """

    class_names: ClassVar[Mapping[str, tuple[str, ...]]]
    """Roles that ``model_index.json`` must list, with the classes that are known."""
    weight_ignores: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Patterns of checkpoint tensors that a component does not use, by component."""
    options_class: ClassVar[type[RequestOptions]] = RequestOptions
    """What requests may set on these models only. The command line, the HTTP schema
    and :meth:`generate` take what it declares."""
    weight_transforms: ClassVar[Mapping[str, WeightTransform]] = {}
    """For components whose files name, fuse, transpose or quantise tensors otherwise
    than the graphs ask for them; :class:`~max_diffusion.checkpoint.ComponentWeights`
    says what can be made of them."""
    parts_of_file: ClassVar[PartsOfFile | None] = None
    """Of families whose transformer comes in files of their own, too: which components
    such a file holds, and how each is read."""

    lora_names: ClassVar[Mapping[str, LoraNaming]] = {}
    """For components that LoRA files name otherwise than by ``component.module``."""

    cell: int = 1
    """Pixels a side that one image token stands for; sizes are multiples of it."""
    token_channels: int
    """Channels of an image token's latents."""
    default_size: tuple[int, int] = (1024, 1024)
    """Height and width in pixels of an image whose size is not given."""
    has_guidance: bool = False
    """Whether the transformer is told a guidance scale (``guidance``, ``(B,)``)."""
    has_second_text: ClassVar[bool] = False
    """Whether one of its text encoders reads ``prompt_2`` instead of the prompt."""
    default_guidance_scale: float = 3.5
    """What it is told where a request leaves that open."""
    default_true_cfg_scale: float = 1.0
    """Weight of classifier-free guidance where a request leaves that open."""
    own_defaults: GenerationDefaults = GenerationDefaults()
    """Those of these that the model's folder says."""
    pictures: AbstractPictures | None = None
    """How requests start from a picture; a family that takes some sets it in
    :meth:`init_remaining_components`, and names its :attr:`picture_components`."""
    needs_pictures: ClassVar[bool] = False
    """Whether every request must bring some, so that their graphs are compiled with
    the model."""
    default_negative_prompt: str | None = None
    """The negative prompt of requests with such guidance that bring none."""

    @classmethod
    def component_configs(cls, folder: ModelFolder) -> dict[str, dict[str, Any]]:
        """Checks a model folder's roles and returns its configurations by name.

        Raises:
            ModelLoadError: A component is missing, of an unknown class, or does not
                fit the others.
        """
        assert cls.components is not None
        for role, names in cls.class_names.items():
            folder.require(role, names)
        roles = [*cls.components, *(r for r in ("scheduler",) if r in cls.class_names)]
        configs = {role: folder.config(role) for role in roles}
        cls.check_configs(configs)
        return configs

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises :class:`ModelLoadError` where components do not fit each other."""

    @abstractmethod
    def text_length(self, options: RequestOptions) -> int:
        """Text tokens that the transformer reads of each prompt.

        Args:
            options: Of the request, an instance of :attr:`options_class`.

        Raises:
            RequestError: The model cannot read so many.
        """

    @abstractmethod
    def tokenize(self, texts: PromptTexts, length: int, what: str) -> Tokenized:
        """Texts to the ids of every text encoder.

        Args:
            texts: Of one or more prompts.
            length: From :meth:`text_length`.
            what: ``prompt`` or ``negative prompt``, for notes.
        """

    @abstractmethod
    def draw_noise(self, request: GenerationRequest, grid: Grid) -> np.ndarray:
        """The request's seeded noise, packed: float32 ``(B, S_img, C)``."""

    def sampling_of(self, context: GenerationContext) -> RequestSampling:
        """What of sampling is the request's own; nothing, as most models have it.

        Called once a run of the context. For a sampler that ``needs_noise`` a family
        gives what goes on drawing where :meth:`draw_noise` ended.
        """
        return RequestSampling()

    def tables(self, context: GenerationContext) -> Mapping[str, np.ndarray]:
        """Inputs of the transformer without a batch axis, such as rotary tables."""
        return {}

    @abstractmethod
    def encode_text(
        self, tokens: Mapping[str, np.ndarray], context: GenerationContext
    ) -> Mapping[str, Buffer]:
        """Runs the text encoders.

        Args:
            tokens: From :meth:`tokenize`, a row each text; of equal ones, one.
            context: Of the request.

        Returns:
            Inputs of the transformer by name, those with a batch axis with a row each
            text.
        """

    @abstractmethod
    def decode(self, context: GenerationContext, latents: Buffer) -> np.ndarray:
        """Latents ``(B, S_img, C)`` to frames, uint8 ``(B, F, H, W, 3)``, in one go."""

    @abstractmethod
    def decode_bytes(self, height: int, width: int, num_frames: int) -> int:
        """Bytes that :meth:`decode` takes for each sample while it runs."""

    def frames_of(self, options: RequestOptions) -> Frames:
        """Returns the frames of each sample: one, of a model that draws images.

        Args:
            options: Of the request, an instance of :attr:`options_class`.
        """
        return Frames()

    def resolved_options(self, context: GenerationContext) -> Mapping[str, object]:
        """The options of a request for its report; a family adds its own choices."""
        return {k: v for k, v in vars(context.options).items() if v is not None}

    def default_sources(self) -> Mapping[str, str]:
        """Where the defaults come from, by the request's names, for the report."""
        return {}

    def create_context(self, request: GenerationRequest) -> GenerationContext:
        """Tokenizes, draws the noise, lays out the schedule and binds the cache.

        No device work, and no compiled graph: an opened pipeline checks requests so.

        Raises:
            RequestError: A size that is no multiple of the model's cell, more text
                tokens than it reads, or a cache that it cannot run.
        """
        return make_context(self, request)

    def grid_of(
        self, height: int | None, width: int | None, latent_frames: int = 1
    ) -> Grid:
        """The image tokens of a size in pixels.

        Raises:
            RequestError: A side that is no multiple of :attr:`cell`.
        """
        sides = []
        for name, value, default in zip(
            ("height", "width"), (height, width), self.default_size, strict=True
        ):
            size, cell = default if value is None else value, self.cell
            if size % cell or size < cell:
                low = size // cell * cell
                near = [str(n) for n in (low, low + cell) if n]
                raise RequestError(
                    f"request: {name} must be a multiple of {cell} pixels, got {size}; "
                    f"nearest: {' or '.join(near)}"
                )
            sides.append(size // cell)
        rows, columns = sides
        return Grid(latent_frames, rows, columns)

    def prepare_inputs(self, context: GenerationContext) -> GenerationInputs:
        """Noise and tables to the device."""
        return GenerationInputs(
            latents=to_device(context.latents, self.device),
            tables={
                name: to_device(table, self.device)
                for name, table in self.tables(context).items()
            },
            context=context,
        )

    def encode(self, model_inputs: GenerationInputs) -> Denoising:
        """Runs the encoders: prepared inputs to a loop before its first step."""
        context = model_inputs.context
        if context.loras:
            self.graphs.require(context.cache.config.graph_groups, self.denoiser)
        skipped = context.num_inference_steps - context.timesteps.size
        begun = Begun(model_inputs.latents)
        if context.given is not None:
            begun = begin_from_pictures(self, context)
        texts = {"conditional": context.tokens}
        if context.negative_tokens is not None:
            texts["unconditional"] = context.negative_tokens
        with self.graphs.text_encoders():
            pipeline = adapted(self, context.loras)  # of the graphs that are here now
            branches = [
                text_branch(pipeline, name, model_inputs, tokens, begun.inputs)
                for name, tokens in texts.items()
            ]
        return pipeline.begin(
            begun.latents,
            Schedule(context.sigmas, context.timesteps, skipped),
            branches,
            true_cfg_scale=context.true_cfg_scale,
            cache=context.cache,
            grid=context.grid,
            kept=begun.kept,
            sampling=self.sampling_of(context),
            is_timed=context.is_timed,
        )

    def execute(self, model_inputs: Any, **kwargs: Any) -> DiffusionPipelineOutput:
        """Encodes, denoises, decodes.

        Args:
            model_inputs: From :meth:`prepare_inputs`.
            kwargs: ``on_step``, see :meth:`generate`.
        """
        started = time.perf_counter()
        denoising = self.encode(model_inputs)
        encoded = time.perf_counter()
        self.run_steps(denoising, **kwargs)
        denoised = self.finish(denoising)
        ended = time.perf_counter()
        frames = decode_in_goes(self, model_inputs.context, denoised.latents)
        return DiffusionPipelineOutput(
            frames,
            denoised.steps,
            denoised.cache_bytes,
            {
                "encode": encoded - started,
                "denoise": ended - encoded,
                "decode": time.perf_counter() - ended,
            },
        )

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        prompt_2: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        sigmas: Sequence[float] | None = None,
        image: PictureLike | Sequence[PictureLike] | None = None,
        mask: PictureLike | None = None,
        strength: float | None = None,
        cache: str | DenoisingCacheConfig | AbstractCacheConfig | None = None,
        cache_memory_limit: int | None = None,
        loras: GivenLoras | None = None,
        is_timed: bool = False,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Draws pictures.

        Args:
            prompt: One prompt or several; several run as one batch.
            prompt_2: What a second text encoder (FLUX.1's T5) reads instead: one text
                for all prompts, or one for each. As in diffusers, a single empty text
                is the prompt again; in a list it is empty.
            height: Pixels, a multiple of the model's step; default the model's.
            width: Likewise.
            num_inference_steps: Denoising steps; default the model's (FLUX.1: 28, or 4
                without guidance embedding), which the report names.
            guidance_scale: Input of a guidance-distilled model, default its own. On
                other models it does nothing: up to 1, which asks for no guidance, that
                is as it should be, above it the report warns.
            true_cfg_scale: Classifier-free guidance by a second pass, above 1 with a
                negative prompt; doubles the time.
            negative_prompt: What the second pass is told, of all prompts or of each;
                may be empty.
            negative_prompt_2: The same of ``prompt_2``.
            seed: Noise of ``torch.Generator("cpu").manual_seed(seed)``, of which all
                pictures share one stream; or one seed for each picture, which is then
                the same when it is drawn alone. Random if ``None``, and then in the
                report; -1 is a seed like others here, as in torch.
            num_images_per_prompt: Pictures of each prompt.
            sigmas: A schedule of your own: decreasing, in (0, 1], without the final 0.
            image: A picture to start from: a path, a file's bytes, an image of Pillow's
                or uint8 ``(H, W, 3)``; several for models that take them. Without
                ``height`` and ``width`` what is drawn has its size, rounded down, or
                the model's default area in its shape if that is less.
            mask: What of the picture is drawn anew, where it is light, or, if it is
                transparent anywhere, where it is; of the picture's size.
            strength: How much of the schedule is run, from the picture with noise of
                that level; above 0 to 1, default 0.6. Of 28 steps, 0.5 runs the last
                14.
            cache: This call's cache instead of the pipeline's: a configuration, or a
                name of ``CACHES`` for its defaults. Never recompiles.
            cache_memory_limit: Most bytes that the cache's state may take on the
                device; a cache that would need more is refused before anything runs.
            loras: LoRAs of this call, of those that ``load_pipeline`` was given as
                ``adapters``: a name, several, or weights by name. Nothing compiles; a
                choice that is new is merged first.
            is_timed: Time each step on a GPU too, which is then waited for twice a
                step; on a CPU the report always has its milliseconds.
            on_step: Called with ``(steps done, steps)``; raise
                :class:`RequestCancelled` in it to stop.
            options: What only some models have, by the names that the model's
                :attr:`options_class` declares: ``max_sequence_length`` of FLUX.1.

        Raises:
            RequestError: A value is missing, malformed or out of range.
            RequestCancelled: ``on_step`` raised it.
            DeviceError: Out of memory.
            MaxDiffusionError: The result is not finite.
        """
        prompts = (prompt,) if isinstance(prompt, str) else as_tuple("prompt", prompt)
        seeds = None
        if seed is None:
            seed = secrets.randbelow(_MAX_SEED)
        elif isinstance(seed, Iterable) and not isinstance(seed, str):
            seeds = as_tuple("seed", seed)
            seed = seeds[0] if seeds else 0
        request = GenerationRequest(
            prompts=prompts,
            prompt_2=as_texts("prompt_2", prompt_2),
            negative_prompt=as_texts("negative_prompt", negative_prompt),
            negative_prompt_2=as_texts("negative_prompt_2", negative_prompt_2),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            seed=seed,
            seeds=seeds,
            num_images_per_prompt=num_images_per_prompt,
            sigmas=None if sigmas is None else as_tuple("sigmas", sigmas),
            inputs=picture_inputs(image, mask, strength),
            cache=self.caches.given(cache),
            cache_memory_limit=cache_memory_limit,
            loras=as_loras("request: loras", loras),
            options=options,
            is_timed=is_timed,
        )
        return self.draw(request, on_step=on_step)

    def draw(
        self, request: GenerationRequest, *, on_step: OnStep | None = None
    ) -> GenerationResult:
        """:meth:`generate` of a request that is there already."""
        started = time.perf_counter()
        with memory_errors_said():
            context = self.create_context(request)
            output = self.execute(self.prepare_inputs(context), on_step=on_step)
        seconds = time.perf_counter() - started
        report = report_of(self, request, context, output, seconds)
        return GenerationResult(output.frames, report, context.fps)
