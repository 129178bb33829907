"""What MAX registers: tokenizer, context and pipeline by MAX's contracts.

MAX runs two processes. The tokenizer checks each request in the one that speaks HTTP,
where a refusal still becomes an answer; the pipeline draws in the other, the worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, cast, final

import numpy as np
from max.driver import Device
from max.engine import InferenceSession
from max.graph.weights import WeightsFormat
from max.pipelines.context import PixelContext, TokenBuffer
from max.pipelines.context.exceptions import InputError
from max.pipelines.diffusion.config import GENERIC_TAYLORSEER_DEFAULTS
from max.pipelines.lib import SupportedArchitecture
from max.pipelines.lib.config import MAXModelConfig, PipelineConfig
from max.pipelines.modeling.types import PipelineTask
from max.pipelines.request import OpenResponsesRequest, OpenResponsesRequestBody
from max.serve.config import APIType, Settings

from ...caches import DenoisingCacheConfig, label_of
from ...core.request import GenerationRequest
from ...errors import CacheNotLoadedError, DeviceError, MaxDiffusionError, RequestError
from ...pipelines.context import options_of
from ...pipelines.families import PIPELINES
from ...pipelines.opening import load_pipeline, open_model
from ...pipelines.text_to_image import TextToImagePipeline
from .requests import (
    brings_pictures,
    check_drawn,
    check_kind,
    from_json,
    pixel_options,
    to_json,
    to_request,
)
from .settings import ServeSettings

# MAX shows what its own loggers say, and no others.
logger = logging.getLogger("max.pipelines.max_diffusion")

_TEXT_TOKENS: Final = 512


@dataclass(kw_only=True)
class ImageContext(PixelContext):
    """A checked request on its way to the worker.

    MAX reads its own fields of it. The image is drawn from ``request``, because MAX
    has no place for a cache; tokens and noise are made again from it in milliseconds.
    """

    request: str = field(default="")
    """The request as text, written by
    :func:`~max_diffusion.serving.max_serve.requests.to_json`; the pixels of its
    pictures are ``input_images``."""


@dataclass(frozen=True)
class Drawn:
    """What MAX takes of a pipeline's result."""

    images: np.ndarray
    """Images, uint8 ``(B, H, W, 3)``, or videos, uint8 ``(B, 3, F, H, W)``."""


@dataclass(frozen=True)
class ImageConfig:
    """Lengths that MAX asks for; of no effect, since the model's own files tell."""

    secondary_max_seq_len: int = _TEXT_TOKENS

    @classmethod
    def initialize(
        cls,
        pipeline_config: PipelineConfig,
        model_config: MAXModelConfig | None = None,
        *,
        max_seq_len: int,
    ) -> Self:
        """Creates the configuration, the same for every model."""
        return cls()

    @classmethod
    def calculate_max_seq_len(
        cls, huggingface_config: Any, model_config: MAXModelConfig
    ) -> int:
        """Returns the most text tokens, the same for every model."""
        return _TEXT_TOKENS

    def get_max_seq_len(self) -> int:
        """Returns the most text tokens, the same for every model."""
        return _TEXT_TOKENS


@final
class ImageTokenizer:
    """Checks requests against the model, which it opens but never compiles.

    Called by MAX with more than it needs: tokenizers, lengths and schedules come from
    the model's folder.
    """

    def __init__(
        self, model_path: str, pipeline_config: PipelineConfig, **kwargs: Any
    ) -> None:
        try:
            self._settings = ServeSettings.from_environment(os.environ)
            self._pipeline = _open_uncompiled(pipeline_config, self._settings)
        except MaxDiffusionError as err:
            # One line on the terminal; MAX would show a traceback of any other.
            raise SystemExit(f"error: max_diffusion: {err}") from err
        # A picture may take 600 MB while it is read: one after the other.
        self._reading = asyncio.Lock()
        _restore_environment()
        names = ", ".join(map(label_of, self._settings.caches))
        logger.info("max_diffusion: caches %s", names)
        if APIType.OPENRESPONSES not in Settings().api_types:
            logger.warning(
                "max_diffusion: /v1/responses, the way to ask for pictures, is off; "
                'set MAX_SERVE_API_TYPES=\'["openai","responses"]\''
            )

    async def new_context(self, request: OpenResponsesRequest) -> ImageContext:
        """Checks a request and returns it as MAX's worker takes it.

        Raises:
            InputError: The request cannot be drawn; MAX answers 400 with the message.
        """
        # Tokenizing and drawing noise take milliseconds, which others need not wait.
        if brings_pictures(request.body):
            async with self._reading:
                return await asyncio.to_thread(self._context, request)
        return await asyncio.to_thread(self._context, request)

    def _context(self, request: OpenResponsesRequest) -> ImageContext:
        try:
            wanted = self._wanted(request.body)
            given = pixel_options(request.body)
            options = options_of(self._pipeline, wanted.options)
            frames = self._pipeline.frames_of(options)
            check_kind(given, frames)
            numbers = self._pipeline.create_context(wanted)
            check_drawn(numbers.height, numbers.width, frames.count, self._settings)
        except CacheNotLoadedError as err:
            raise InputError(
                f"{err.problem}; use another, or start the server with {err.cache} in "
                "MAX_DIFFUSION_CACHES"
            ) from err
        except RequestError as err:
            raise InputError(str(err)) from err
        return ImageContext(
            request_id=request.request_id,
            model_name=request.body.model,
            tokens=TokenBuffer(next(iter(numbers.tokens.values()))[0]),
            height=numbers.height,
            width=numbers.width,
            num_inference_steps=numbers.num_inference_steps,
            guidance_scale=numbers.guidance_scale,
            true_cfg_scale=numbers.true_cfg_scale,
            num_images_per_prompt=numbers.num_images_per_prompt,
            # Of videos MAX decides.
            output_format=getattr(given, "output_format", "jpeg"),
            seed=wanted.seed,
            request=to_json(wanted),
            input_images=(
                [picture.pixels for picture in wanted.inputs.images]
                if wanted.inputs is not None
                else None
            ),
        )

    def _wanted(self, body: OpenResponsesRequestBody) -> GenerationRequest:
        """Returns the request of a body, without what the model would say to it."""
        pictures = self._pipeline.pictures
        if pictures is None or not self._pipeline.graphs.has_pictures:
            return to_request(body, self._settings)
        most = pictures.max_pictures, pictures.most_read_pixels
        return to_request(body, self._settings, *most)


@final
class ImagePipeline:
    """A pipeline of this package behind MAX's contract of a ``DiffusionPipeline``.

    Of the arguments only the configuration is read: ``load_pipeline`` finds weights and
    device itself, and compiles in a session of its own.
    """

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession,
        devices: list[Device],
        weight_paths: Sequence[str],
        cache_config: Any = None,
    ) -> None:
        settings = ServeSettings.from_environment(os.environ)
        device, dtype = _device_and_dtype(pipeline_config)
        self._pipeline = load_pipeline(
            _model_path(pipeline_config),
            device,
            dtype,
            _default_cache(pipeline_config),
            caches=settings.caches,
            is_extensible=False,
            transformer=settings.transformer,
            adapters=settings.loras,
            adapter_memory_limit=settings.lora_memory,
            takes_pictures=bool(settings.pictures),
            revision=_revision(pipeline_config),
            precompiled=settings.precompiled,
            require_precompiled=bool(settings.require_precompiled),
        )

    def prepare_inputs(self, context: ImageContext) -> ImageContext:
        """Returns the request as it is: nothing is kept between requests."""
        return context

    def execute(self, model_inputs: ImageContext) -> Drawn:
        """Draws; what MAX's answer has no field for is logged."""
        images = model_inputs.input_images or ()
        result = self._pipeline.draw(from_json(model_inputs.request, images))
        report = result.report
        logger.info(
            "max_diffusion: request %s: seed %d, cache %s, %d of %d full passes, "
            "%.2f s",
            model_inputs.request_id,
            report.seed,
            report.cache["name"],
            report.full_passes,
            report.total_passes,
            report.total_seconds,
        )
        for warning in report.warnings:
            logger.warning(
                "max_diffusion: request %s: %s", model_inputs.request_id, warning
            )
        if result.frames.shape[1] == 1:
            return Drawn(result.images)
        return Drawn(result.frames.transpose(0, 4, 1, 2, 3))


def _open_uncompiled(
    config: PipelineConfig, settings: ServeSettings
) -> TextToImagePipeline:
    """Opens a pipeline that can check requests, but draw none.

    It is on the host, so that this process takes nothing of a GPU.
    """
    device, dtype = _device_and_dtype(config)
    return open_model(
        _model_path(config),
        "cpu",
        dtype or (None if device == "cpu" else "bfloat16"),
        _default_cache(config),
        caches=settings.caches,
        is_extensible=False,
        transformer=settings.transformer,
        adapters=settings.loras,
        # By default a quarter of what the worker's device has free, which it knows.
        adapter_memory_limit=(
            (settings.lora_memory or sys.maxsize) if settings.loras else None
        ),
        takes_pictures=bool(settings.pictures),
        revision=_revision(config),
    )


def _restore_environment() -> None:
    """Takes back what MAX 26.7 has set in C, unseen by Python, when it is imported.

    The worker, a child of this process, would inherit it, take itself for a Python
    outside the virtual environment, and not find packages installed as editable.
    """
    for name in ("PYTHONPATH", "PYTHONEXECUTABLE"):
        if name in os.environ:
            os.putenv(name, os.environ[name])
        else:
            os.unsetenv(name)


def _model_path(config: PipelineConfig) -> str:
    return str(next(iter(config.models.values())).model_path)


def _revision(config: PipelineConfig) -> str | None:
    """Returns the hub's revision; ``None`` for folders, though MAX says ``main``."""
    if os.path.isdir(_model_path(config)):
        return None
    return next(iter(config.models.values())).huggingface_model_revision


def _device_and_dtype(config: PipelineConfig) -> tuple[str, str | None]:
    """Returns the device and the dtype that MAX's flags name.

    The flags are ``--devices`` and ``--quantization-encoding``; the names are this
    package's.
    """
    model = next(iter(config.models.values()))
    if len(model.device_specs) != 1:
        raise DeviceError(
            f"--devices: expected one device, got {len(model.device_specs)}; a model "
            "runs on one"
        )
    spec = model.device_specs[0]
    device = "cpu" if spec.device_type == "cpu" else f"gpu:{spec.id}"
    # MAX infers it for components only where one of its own loads weights: this is what
    # the operator gave.
    return device, model.quantization_encoding


def _default_cache(config: PipelineConfig) -> DenoisingCacheConfig:
    """Returns the cache that MAX's flags set, which have the same names."""
    given = config.runtime.denoising_cache
    return DenoisingCacheConfig(
        first_block_caching=given.first_block_caching,
        taylorseer=given.taylorseer,
        taylorseer_cache_interval=given.taylorseer_cache_interval,
        taylorseer_warmup_steps=given.taylorseer_warmup_steps,
        taylorseer_max_order=given.taylorseer_max_order,
    )


def _architecture(name: str) -> SupportedArchitecture:
    return SupportedArchitecture(
        name=name,
        example_repo_ids=[],
        default_encoding="float32",
        supported_encodings={"float32", "bfloat16"},
        # MAX takes these two by their methods; its annotations know fewer kinds.
        pipeline_model=cast(Any, ImagePipeline),
        tokenizer=cast(Any, ImageTokenizer),
        task=PipelineTask.PIXEL_GENERATION,
        default_weights_format=WeightsFormat.safetensors,
        context_type=ImageContext,
        config=ImageConfig,
        denoising_cache_defaults=GENERIC_TAYLORSEER_DEFAULTS,
    )


# MAX wants a list.
ARCHITECTURES: Final = [_architecture(name) for name in PIPELINES]
