"""Guidance branches, from the ids of their texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from max.driver import Buffer

from ..core.buffers import take_rows, to_device
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

    Each text once: pictures of the same one share its states.

    Args:
        pipeline: What encodes.
        name: ``conditional`` or ``unconditional``.
        inputs: Of the request.
        tokens: Ids of its prompts by text encoder, ``(P, S)``.
        given: What the transformer reads of its pictures.
    """
    context = inputs.context
    texts = [
        tuple(row.tobytes() for row in rows)
        for rows in zip(*tokens.values(), strict=True)
    ]
    distinct = [*dict.fromkeys(texts)]
    first = [texts.index(text) for text in distinct]
    once = {role: ids[first] for role, ids in tokens.items()}
    found = pipeline.encode_text(once, context)
    count = context.num_images_per_prompt
    rows = [distinct.index(text) for text in texts for _ in range(count)]
    if rows != [*range(len(distinct))]:
        denoiser = pipeline.denoiser
        batched = found.keys() if denoiser is None else denoiser.inputs.batched
        found = {
            name: take_rows(value, rows) if name in batched else value
            for name, value in found.items()
        }
    held = {**found, **inputs.tables, **given}
    if pipeline.has_guidance:
        scale = np.full(len(context.latents), context.guidance_scale, np.float32)
        held["guidance"] = to_device(scale, pipeline.device)
    return Branch(name, held)
