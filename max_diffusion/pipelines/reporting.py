"""What became of a request, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..core.report import RunReport
from ..core.request import GenerationContext, GenerationRequest
from .outputs import DiffusionPipelineOutput

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline


def report_of(
    pipeline: TextToImagePipeline,
    request: GenerationRequest,
    context: GenerationContext,
    output: DiffusionPipelineOutput,
    total_seconds: float,
) -> RunReport:
    """The report of a finished request.

    Args:
        pipeline: What ran it.
        request: As it was asked for; its pictures may be gone.
        context: The same as numbers.
        output: What it gave.
        total_seconds: From the request to the images.
    """
    seconds, config = output.seconds or {}, context.cache.config
    has_negative = context.negative_tokens is not None
    negative = request.negative_prompt
    if has_negative and negative is None:
        negative = pipeline.default_negative_prompt
    return RunReport(
        model=pipeline.pipeline_config.model_name,
        transformer=pipeline.pipeline_config.checkpoint_file,
        device=str(pipeline.device.label),
        dtype=pipeline.dtype.name,
        prompts=request.prompts,
        prompt_2=request.prompt_2,
        negative_prompt=negative if has_negative else None,
        negative_prompt_2=request.negative_prompt_2 if has_negative else None,
        height=context.height,
        width=context.width,
        num_inference_steps=context.num_inference_steps,
        guidance_scale=context.guidance_scale if pipeline.has_guidance else None,
        true_cfg_scale=context.true_cfg_scale,
        seed=request.seeds[0] if request.seeds else request.seed,
        seeds=request.seeds or (),
        num_images=len(output.frames),
        image_tokens=context.grid.num_tokens,
        text_tokens=context.text_tokens,
        options=pipeline.resolved_options(context),
        cache={"name": config.name, **asdict(config)},
        steps=output.steps,
        cache_bytes=output.cache_bytes,
        load_seconds=pipeline.seconds["load"],
        compile_seconds=pipeline.seconds["compile"],
        compile_count=pipeline.compile_count,
        encode_seconds=seconds.get("encode", 0.0),
        denoise_seconds=seconds.get("denoise", 0.0),
        decode_seconds=seconds.get("decode", 0.0),
        total_seconds=total_seconds,
        warnings=context.warnings,
        defaults=context.defaults,
        versions=_versions(),
        sigmas=request.sigmas,
        loras=dict((*pipeline.pipeline_config.loras, *request.loras)),
        images=context.images,
        mask=context.mask,
        strength=context.strength,
        reference_tokens=context.reference_tokens,
        sampler=type(pipeline.sampler).__name__.removesuffix("Sampler"),
    )


@cache
def _versions() -> Mapping[str, str]:
    """Of the packages that run; looking them up takes milliseconds."""
    return {name: version(name) for name in ("max-diffusion", "max")}
