"""Guidance branches, from the ids of their texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from max.driver import Buffer

from ..core.buffers import repeat_rows, to_device
from ..denoising import Branch
from .outputs import GenerationInputs

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline


def text_branch(
    pipeline: TextToImagePipeline,
    name: str,
    inputs: GenerationInputs,
    tokens: Mapping[str, np.ndarray],
    given: Mapping[str, Buffer],
) -> Branch:
    """Encodes the texts of a guidance branch, and returns its inputs.

    Args:
        pipeline: What encodes.
        name: ``conditional`` or ``unconditional``.
        inputs: Of the request.
        tokens: Ids of its prompts by text encoder, ``(P, S)``.
        given: What the transformer reads of its pictures.
    """
    context = inputs.context
    count = context.num_images_per_prompt
    rows = {role: repeat_rows(ids, count) for role, ids in tokens.items()}
    held = {**pipeline.encode_text(rows, context), **inputs.tables, **given}
    if pipeline.has_guidance:
        scale = np.full(len(context.latents), context.guidance_scale, np.float32)
        held["guidance"] = to_device(scale, pipeline.device)
    return Branch(name, held)
