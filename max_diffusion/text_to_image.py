"""Text to image: the short way in, on top of the documented contract."""

from __future__ import annotations

import json
import secrets
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar, get_type_hints

import numpy as np
from max.driver import Buffer

from .buffers import take_rows
from .caches import (
    CACHES,
    CacheConfig,
    DenoisingCacheConfig,
    NoCacheConfig,
    Run,
    cache_name,
)
from .checkpoint import ModelFolder
from .compile import memory_errors_said
from .errors import RequestError
from .host_memory import host_memory
from .loop import Denoising
from .pipeline import DiffusionPipeline, DiffusionPipelineOutput, OnStep
from .report import RunReport, plain
from .types import GenerationContext, GenerationRequest

LATENT_BUFFERS: Final = 4
"""Latents, their prediction, and the next of both, in float32."""
_GO_PIXELS: Final = 2**20
_MAX_SEED = 2**32
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationResult:
    """Pictures and how they came about."""

    images: np.ndarray
    """uint8 ``(B, H, W, 3)``; all pictures of the first prompt first."""
    report: RunReport
    """What ``--json`` prints, by ``to_dict()``."""


class TextToImagePipeline(DiffusionPipeline):
    """A pipeline that ``load_pipeline`` can build and ``generate`` can drive."""

    weight_ignores: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    class_names: ClassVar[Mapping[str, tuple[str, ...]]]
    """Classes that each role used of a model folder may have."""
    has_guidance: bool = False
    """Whether the model takes a guidance scale; set when it is loaded."""

    @classmethod
    @abstractmethod
    def component_configs(cls, folder: ModelFolder) -> dict[str, dict[str, Any]]:
        """Checks a model folder's roles and returns its configurations by name."""

    @classmethod
    @abstractmethod
    def token_counts(
        cls,
        folder: ModelFolder,
        configs: Mapping[str, Mapping[str, Any]],
        height: int | None,
        width: int | None,
    ) -> tuple[int, int]:
        """Image tokens of a picture's size, and the most text tokens."""

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of a picture whose size is not given."""

    @abstractmethod
    def create_context(self, request: GenerationRequest) -> GenerationContext:
        """A request as numbers: tokens, noise, schedule."""

    @abstractmethod
    def encode(self, model_inputs: Any) -> Denoising:
        """Runs the text encoders: prepared inputs to a loop before its first step."""

    @abstractmethod
    def decode(self, context: GenerationContext, latents: Buffer) -> np.ndarray:
        """Latents ``(B, S_img, C)`` to pictures, uint8 ``(B, H, W, 3)``, in one go."""

    @abstractmethod
    def decode_bytes(self, height: int, width: int) -> int:
        """Bytes that :meth:`decode` takes for each picture while it runs."""

    def decode_in_goes(
        self, context: GenerationContext, latents: Buffer, room: int | None = None
    ) -> np.ndarray:
        """:meth:`decode` of so many pictures at a time as there is room for.

        Goes of more than a megapixel take memory and save no time, so that there are
        more of them than the room asks for. Every picture is the same to the bit.

        Args:
            context: Of the request.
            latents: ``(B, S_img, C)``.
            room: Bytes for decoding; one picture at a time is the least.
        """
        batch, pixels = int(latents.shape[0]), context.height * context.width
        count = max(1, _GO_PIXELS // pixels)
        if room is not None:
            each = self.decode_bytes(context.height, context.width)
            count = min(count, max(1, room // each))
        if count >= batch:
            return self.decode(context, latents)
        images = np.empty((batch, context.height, context.width, 3), np.uint8)
        for start in range(0, batch, count):
            rows = range(start, min(start + count, batch))
            images[start : rows.stop] = self.decode(context, take_rows(latents, rows))
        return images

    def check_room(self, batch: int, height: int, width: int, each: int) -> None:
        """Refuses a request that could never fit this machine's memory.

        Args:
            batch: Pictures.
            height: Pixels.
            width: Pixels.
            each: Bytes of the latents of a picture.

        Raises:
            RequestError: All its latents and pictures, and what decoding one picture
                takes, are more than there is.
        """
        if not self.device.is_host:
            return  # what its memory manager holds is not known
        held = batch * (LATENT_BUFFERS * each + 3 * height * width)
        needed, there = held + self.decode_bytes(height, width), host_memory()
        if needed > there:
            raise RequestError(
                f"request: {batch} pictures of {width} x {height} need at least "
                f"{needed >> 20} MiB, and this process may have {there >> 20}; ask for "
                "fewer or smaller ones"
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
        images = self.decode_in_goes(model_inputs.context, denoised.latents)
        return DiffusionPipelineOutput(
            images,
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
        true_cfg_scale: float = 1.0,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int | None = None,
        sigmas: Sequence[float] | None = None,
        cache: str | DenoisingCacheConfig | CacheConfig | None = None,
        cache_memory_limit: int | None = None,
        on_step: OnStep | None = None,
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
            guidance_scale: Input of a guidance-distilled model, default 3.5. On other
                models it does nothing: up to 1, which asks for no guidance, that is
                as it should be, above it the report warns.
            true_cfg_scale: Classifier-free guidance by a second pass, above 1 with a
                negative prompt; doubles the time.
            negative_prompt: What the second pass is told, of all prompts or of each;
                may be empty.
            negative_prompt_2: The same of ``prompt_2``.
            seed: Noise of ``torch.Generator("cpu").manual_seed(seed)``, of which all
                pictures share one stream; or one seed for each picture, which is then
                the same when it is drawn alone. Random if ``None``, and then in the
                report.
            num_images_per_prompt: Pictures of each prompt.
            max_sequence_length: Tokens of the second text encoder, padding included;
                default the most the model takes. It changes the picture: FLUX.1-schnell
                is usually run at 256.
            sigmas: A schedule of your own: decreasing, in (0, 1], without the final 0.
            cache: This call's cache instead of the pipeline's: a configuration, or a
                name of ``CACHES`` for its defaults. Never recompiles.
            cache_memory_limit: Most bytes that the cache's state may take on the
                device; a cache that would need more is refused before anything runs.
            on_step: Called with ``(steps done, steps)``; raise
                :class:`RequestCancelled` in it to stop.

        Raises:
            RequestError: A value is missing, malformed or out of range.
            RequestCancelled: ``on_step`` raised it.
            DeviceError: Out of memory.
            MaxDiffusionError: The result is not finite.
        """
        prompts = (prompt,) if isinstance(prompt, str) else _tuple("prompt", prompt)
        seeds = None
        if seed is None:
            seed = secrets.randbelow(_MAX_SEED)
        elif isinstance(seed, Iterable) and not isinstance(seed, str):
            seeds = _tuple("seed", seed)
            seed = seeds[0] if seeds else 0
        request = GenerationRequest(
            prompts=prompts,
            prompt_2=_texts("prompt_2", prompt_2),
            negative_prompt=_texts("negative_prompt", negative_prompt),
            negative_prompt_2=_texts("negative_prompt_2", negative_prompt_2),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            seed=seed,
            seeds=seeds,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            sigmas=None if sigmas is None else _tuple("sigmas", sigmas),
            cache=self.cache_config if cache is None else self._cache(cache),
            cache_memory_limit=cache_memory_limit,
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
        report = self.report(request, context, output, time.perf_counter() - started)
        return GenerationResult(output.images, report)

    def report(
        self,
        request: GenerationRequest,
        context: GenerationContext,
        output: DiffusionPipelineOutput,
        total_seconds: float,
    ) -> RunReport:
        """What became of a request."""
        seconds = output.seconds or {}
        cache = self.resolve_cache(request.cache or self.cache_config)
        has_negative = context.negative_tokens is not None
        return RunReport(
            model=self.pipeline_config.model_name,
            device=str(self.device.label),
            dtype=self.dtype.name,
            prompts=request.prompts,
            prompt_2=request.prompt_2,
            negative_prompt=request.negative_prompt if has_negative else None,
            negative_prompt_2=request.negative_prompt_2 if has_negative else None,
            height=context.height,
            width=context.width,
            num_inference_steps=context.num_inference_steps,
            guidance_scale=context.guidance_scale if self.has_guidance else None,
            true_cfg_scale=context.true_cfg_scale,
            seed=request.seed,
            seeds=request.seeds or (),
            num_images=len(output.images),
            image_tokens=int(context.latents.shape[1]),
            text_tokens=int(context.tokens_2.shape[1]),
            max_sequence_length=int(context.tokens_2.shape[1]),
            cache={"name": cache_name(cache), **asdict(cache)},
            steps=output.steps,
            cache_bytes=output.cache_bytes,
            load_seconds=self.seconds["load"],
            compile_seconds=self.seconds["compile"],
            compile_count=self.compile_count,
            encode_seconds=seconds.get("encode", 0.0),
            denoise_seconds=seconds.get("denoise", 0.0),
            decode_seconds=seconds.get("decode", 0.0),
            total_seconds=total_seconds,
            warnings=context.warnings,
            defaults=context.defaults,
            versions=self._versions,
            sigmas=request.sigmas,
        )

    def cache_notes(self, config: CacheConfig, run: Run) -> tuple[str, ...]:
        """What a caller should know of a cache in a run, beside errors.

        Args:
            config: The cache.
            run: The request's steps and their timesteps.

        Raises:
            RequestError: As :meth:`check_cache`.
        """
        config = self.resolve_cache(config)
        required = self.check_cache(config, run.num_steps)
        policy = config.create_cache(self.pipeline_config.calibration)
        run = replace(run, required_steps=required)
        if isinstance(config, NoCacheConfig) or policy.skippable_steps(run) - required:
            return ()
        return (
            f"cache: {cache_name(config)} skips none of {run.num_steps} steps with "
            "these settings, so it only takes memory; take other settings, more steps "
            "or no cache",
        )

    @cached_property
    def _versions(self) -> Mapping[str, str]:
        """Of the packages that run; looking them up takes milliseconds."""
        return {name: version(name) for name in ("max-diffusion", "max")}

    def _cache(self, cache: str | DenoisingCacheConfig | CacheConfig) -> CacheConfig:
        if isinstance(cache, str):
            return named_cache(cache)
        return self.resolve_cache(cache)


def _tuple(name: str, values: Iterable[T]) -> tuple[T, ...]:
    try:
        return tuple(values)
    except TypeError as err:
        raise RequestError(
            f"request: {name} must be a sequence, got {type(values).__name__}"
        ) from err


def _texts(
    name: str, given: str | Sequence[str] | None
) -> str | tuple[str, ...] | None:
    """One text or several; what is neither stays for the request to refuse."""
    if given is None or isinstance(given, str):
        return given
    return _tuple(name, given)


def named_cache(name: str, options: Mapping[str, object] | None = None) -> CacheConfig:
    """A cache of ``CACHES`` with its defaults, or with options as JSON has them.

    Raises:
        RequestError: No such name or option, or a value out of range.
    """
    if name not in CACHES:
        raise RequestError(f"cache: expected {', '.join(CACHES)}, got {name!r}")
    known = [item.name for item in fields(CACHES[name])]
    hints = get_type_hints(CACHES[name])
    values: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key not in known:
            raise RequestError(
                f"cache: {name} has no option {key!r}; it has "
                f"{', '.join(known) or 'none'}"
            )
        values[key] = _from_json(f"{name}: {key}", value, hints[key])
    return CACHES[name](**values)


def _from_json(where: str, value: object, hint: object) -> object:
    """An option's value for a field of a type.

    Its configuration checks it as well, but for Python: of what JSON has no name for,
    such as tuples, nobody is told who writes JSON.

    Raises:
        RequestError: It is of another type.
    """
    given = value
    if isinstance(value, list):
        value = tuple(value)
    kinds, expected = _JSON_KINDS[hint]
    is_fitting = isinstance(value, kinds) and (
        hint is bool or not isinstance(value, bool)
    )
    if is_fitting and hint == tuple[int, ...] | str and isinstance(value, tuple):
        is_fitting = all(type(step) is int for step in value)
    if not is_fitting:
        raise RequestError(f"{where} must be {expected}, got {_shown(given)}")
    return value


def _shown(value: object) -> str:
    """As JSON has it, save for the quotes of text."""
    return (
        repr(value)
        if isinstance(value, str)
        else json.dumps(plain(value), default=repr)
    )


# What a field of a cache's configuration takes from JSON, by the field's type.
_JSON_KINDS: Mapping[object, tuple[tuple[type, ...], str]] = MappingProxyType(
    {
        bool: ((bool,), "true or false"),
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        str: ((str,), "text"),
        tuple[int, ...] | str: ((tuple, str), "a list of step indices or a policy"),
        tuple[float, ...]: ((tuple,), "a list of numbers"),
    }
)
