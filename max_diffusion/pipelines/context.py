"""A request as numbers: what happens to it before the device is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..caches import BoundCache, NoCacheConfig, Run
from ..core.buffers import repeat_rows
from ..core.grid import Grid
from ..core.options import RequestOptions, declared_options, read_options
from ..core.request import GenerationContext, GenerationRequest, PromptTexts
from ..errors import RequestError
from ..sampling import Schedule
from .room import check_room
from .starting import (
    check_inputs,
    drawn_size,
    reference_grids,
    remaining,
    strength_of,
)

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline


@dataclass(frozen=True)
class Tokenized:
    """Texts as ids."""

    tokens: Mapping[str, np.ndarray]
    """int64 ``(P, S)`` of each text encoder, by its name."""
    notes: tuple[str, ...] = ()
    """What the caller should know, one line each: text that was cut off, say."""
    text_tokens: int | None = None
    """Text tokens that the transformer reads, where these are not all it may read."""


def make_context(
    pipeline: TextToImagePipeline, request: GenerationRequest
) -> GenerationContext:
    """Tokenizes, draws the noise, lays out the schedule and binds the cache.

    Raises:
        RequestError: See :meth:`TextToImagePipeline.create_context`.
    """
    options = options_of(pipeline, request.options)
    _check_second_texts(pipeline, request)
    check_inputs(pipeline, request)
    frames = pipeline.frames_of(options)
    drawn = drawn_size(pipeline, request, options)
    grid = pipeline.grid_of(drawn.height, drawn.width, frames.latent_count)
    height, width = grid.rows * pipeline.cell, grid.columns * pipeline.cell
    references = reference_grids(pipeline, request, options)
    read_tokens = sum(each.num_tokens for each in references)
    steps = request.num_inference_steps
    if steps is None and request.sigmas is None:
        steps = pipeline.default_num_inference_steps
    whole = pipeline.sampler.schedule(
        steps, image_seq_len=grid.num_tokens, sigmas=request.sigmas
    )
    strength = strength_of(pipeline, request)
    schedule = remaining(whole, strength)
    length = pipeline.text_length(options)
    scale = request.true_cfg_scale
    scale = pipeline.default_true_cfg_scale if scale is None else scale
    negative = request.negative_texts
    if negative is None and pipeline.default_negative_prompt is not None:
        negative = PromptTexts.same(
            pipeline.default_negative_prompt, len(request.prompts)
        )
    has_negative = scale > 1 and negative is not None
    cache, notes = _bound_cache(pipeline, request, schedule, grid, has_negative)
    loras = pipeline.adapters.chosen(request.loras)
    files = pipeline.pipeline_config.loras_with(loras)
    notes = (*notes, *pipeline.caches.notes(cache.config, files))
    words = pipeline.tokenize(request.texts, length, "prompt")
    unwanted = None
    if has_negative and negative is not None:
        unwanted = _tokenize_once(pipeline, negative, length)
    read = [each.text_tokens for each in (words, unwanted) if each is not None]
    text_tokens = max(length if count is None else count for count in read)
    tokens = (request.num_images, grid.num_tokens, text_tokens)
    branches = 2 if has_negative else 1
    check_room(
        pipeline,
        (request.num_images, frames.count, height, width),
        tokens,
        cache.config,
        branches=branches,
        references=references,
    )
    if request.cache_memory_limit is not None:
        pipeline.caches.check_memory(
            cache.config,
            request.cache_memory_limit,
            tokens,
            branches=branches,
            reference_tokens=read_tokens,
        )
    given, inputs = None, request.inputs
    if inputs is None:
        noise = pipeline.draw_noise(request, grid)
    else:
        pictures = pipeline.pictures
        assert pictures is not None, "check_inputs has refused it"
        noise, given = pictures.start(request, inputs, grid, references)
        if given.marks_nothing:
            notes = (
                *notes,
                "the mask marks nothing, so the picture stays as it is; mark with "
                "white, or with transparency, what is to be drawn",
            )
    return GenerationContext(
        tokens=words.tokens,
        negative_tokens=None if unwanted is None else unwanted.tokens,
        text_tokens=text_tokens,
        latents=noise,
        options=options,
        num_frames=frames.count,
        fps=frames.fps,
        grid=grid,
        cache=cache,
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        height=height,
        width=width,
        num_inference_steps=whole.num_steps,
        guidance_scale=_guidance_scale(pipeline, request),
        true_cfg_scale=scale,
        num_images_per_prompt=request.num_images_per_prompt,
        seed=request.seed,
        seeds=request.seeds,
        loras=loras,
        is_timed=request.is_timed,
        given=given,
        references=references,
        images=() if inputs is None else tuple(x.digest for x in inputs.images),
        mask=inputs.mask.digest if inputs is not None and inputs.mask else None,
        strength=strength,
        warnings=(
            *_guidance_warnings(pipeline, request, scale),
            *_option_warnings(options, has_negative, frames.count),
            *_size_warnings(request, height, width),
            *notes,
            *words.notes,
            *(() if unwanted is None else unwanted.notes),
        ),
        defaults={
            name: source
            for name, source in {
                **pipeline.default_sources(),
                **pipeline.own_defaults.sources,
                **drawn.sources,
            }.items()
            if (vars(request) | dict(request.options)).get(name) is None
            and not (name == "num_inference_steps" and request.sigmas is not None)
        },
    )


def _check_second_texts(
    pipeline: TextToImagePipeline, request: GenerationRequest
) -> None:
    """Refuses texts for a second encoder, which would be read by none."""
    for name in ("prompt_2", "negative_prompt_2"):
        # An empty one is the first again, as in diffusers.
        if vars(request)[name] not in (None, "") and not pipeline.has_second_text:
            owner = pipeline.pipeline_config.class_name or type(pipeline).__name__
            raise RequestError(
                f"request: {name} is what a second text encoder reads instead, and "
                f"{owner} has none that does; leave it out"
            )


def options_of(
    pipeline: TextToImagePipeline, given: Mapping[str, object]
) -> RequestOptions:
    """Returns what is given of the options that only some models have.

    Raises:
        RequestError: The model has no such option, or a value is of another type or out
            of range.
    """
    owner = pipeline.pipeline_config.class_name or type(pipeline).__name__
    return read_options(pipeline.options_class, given, owner)


def _bound_cache(
    pipeline: TextToImagePipeline,
    request: GenerationRequest,
    schedule: Schedule,
    grid: Grid,
    has_guidance: bool,
) -> tuple[BoundCache, tuple[str, ...]]:
    """The request's cache, or the pipeline's; and a note if it can skip nothing."""
    config = pipeline.cache_config
    if request.cache is not None:
        config = pipeline.caches.resolve(request.cache)
    cache = pipeline.caches.bind(config, schedule.num_steps)
    known = Run(
        schedule.num_steps,
        tuple(float(timestep) for timestep in schedule.timesteps),
        required_steps=cache.required_steps,
        grid=grid,
        has_guidance=has_guidance,
        skipped_steps=schedule.skipped_steps,
    )
    can_skip = cache.policy.skippable_steps(known) - cache.required_steps
    if can_skip or isinstance(config, NoCacheConfig):
        return cache, ()
    return cache, (
        f"cache: {config.name} skips none of {schedule.num_steps} steps with "
        "these settings, so it only takes memory; take other settings, more steps "
        "or no cache",
    )


def _tokenize_once(
    pipeline: TextToImagePipeline, texts: PromptTexts, length: int
) -> Tokenized:
    """The negative prompts' ids; one of all prompts is read, and said, once."""
    count = len(texts.first)
    if len({*zip(texts.first, texts.second, strict=True)}) > 1:
        return pipeline.tokenize(texts, length, "the negative prompt")
    one = PromptTexts(texts.first[:1], texts.second[:1])
    found = pipeline.tokenize(one, length, "the negative prompt")
    repeated = {name: repeat_rows(x, count) for name, x in found.tokens.items()}
    return replace(found, tokens=repeated)


def _guidance_scale(pipeline: TextToImagePipeline, request: GenerationRequest) -> float:
    """What the guidance embedding is told; 0 where there is none."""
    if not pipeline.has_guidance:
        return 0.0
    scale = request.guidance_scale
    return pipeline.default_guidance_scale if scale is None else scale


def _option_warnings(
    options: RequestOptions, has_guidance: bool, num_frames: int
) -> tuple[str, ...]:
    """What is said of options that lack what they need."""
    lacks = {
        "guidance": "" if has_guidance else "true guidance, which is off",
        "frames": "" if num_frames > 1 else "several frames, and one is drawn",
    }
    return tuple(
        f"{name} has no effect without {lacks[declared.needs]}; leave it out"
        for name, declared in declared_options(type(options)).items()
        if declared.needs is not None
        and lacks[declared.needs]
        and vars(options)[name] is not None
        and vars(options)[name] is not False
    )


def _size_warnings(
    request: GenerationRequest, height: int, width: int
) -> tuple[str, ...]:
    """What is said where an option outweighs the size that a request names."""
    sides = (("width", request.width, width), ("height", request.height, height))
    other = [f"{name} of {asked}" for name, asked, _ in sides if asked is not None]
    if all(asked in (None, drawn) for _, asked, drawn in sides):
        return ()
    return (
        f"{width} x {height} pixels are drawn, not the {' and '.join(other)} that the "
        "request names: max_area scales these; leave it out to draw them as they are",
    )


def _guidance_warnings(
    pipeline: TextToImagePipeline, request: GenerationRequest, true_cfg_scale: float
) -> tuple[str, ...]:
    found = []
    # 0 is how FLUX.1-schnell is called everywhere, and up to 1 no guidance is asked
    # for, which is so where a model has none of its own. More is kept from a script for
    # another model: the image is diffusers', which ignores it, but not what was asked
    # for.
    scale, guides = request.guidance_scale, pipeline.default_true_cfg_scale > 1
    is_asked_for = scale is not None and (scale > 1 or guides)
    if scale is not None and is_asked_for and not pipeline.has_guidance:
        used = ", or use true guidance"
        if guides:
            used = f": true_cfg_scale is what guides here, {true_cfg_scale:g} now"
        found.append(
            f"a guidance scale of {scale:g} has no effect: this model has no "
            f"guidance embedding; leave it out{used}"
        )
    has_negative = request.negative_prompt is not None
    if true_cfg_scale <= 1 and has_negative:
        found.append(
            "the negative prompt has no effect unless true guidance is above 1"
        )
    elif (
        true_cfg_scale > 1
        and not has_negative
        and pipeline.default_negative_prompt is None
    ):
        found.append(
            "true guidance has no effect without a negative prompt; give one, "
            "it may be empty"
        )
    if not has_negative and request.negative_prompt_2 is not None:
        found.append(
            "the second negative prompt has no effect without a negative prompt"
        )
    return tuple(found)
