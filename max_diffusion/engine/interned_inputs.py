"""Inputs of equal contents become one buffer, so that calls with them can be one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from max.driver import Buffer

from ..core.buffers import to_numpy
from ..denoising.loop import Branch, Denoising
from ..pipelines.text_to_image import TextToImagePipeline


def intern_inputs(
    pipeline: TextToImagePipeline, denoising: Denoising, others: Iterable[Denoising]
) -> None:
    """Replaces inputs without a batch axis, such as tables of positions, by others'.

    Calls can be one only if these are the very same buffers, so requests of the same
    size share one. Nothing else holds it: it is gone with the last of them.

    Args:
        pipeline: Says which inputs have a batch axis; these are let be.
        denoising: Whose branches' inputs are replaced, by equal ones.
        others: Loops that run.
    """
    if pipeline.denoiser is None:
        return
    batched = pipeline.denoiser.inputs.batched
    known: dict[Any, list[Buffer]] = {}

    def shareable(branch: Branch) -> list[tuple[str, Buffer, list[Buffer]]]:
        """Inputs by name, each with all that are known of its kind."""
        return [
            (
                name,
                value,
                known.setdefault((name, tuple(value.shape), value.dtype), []),
            )
            for name, value in branch.inputs.items()
            if name not in batched
        ]

    for other in others:
        for branch in other.branches:
            for _, value, alike in shareable(branch):
                if all(value is not each for each in alike):
                    alike.append(value)
    branches = []
    for branch in denoising.branches:
        inputs = dict(branch.inputs)
        for name, value, alike in shareable(branch):
            equal = next((each for each in alike if _is_equal(each, value)), None)
            if equal is None:
                alike.append(value)
            else:
                inputs[name] = equal
        branches.append(replace(branch, inputs=inputs))
    denoising.branches = tuple(branches)


def _is_equal(one: Buffer, other: Buffer) -> bool:
    return one is other or np.array_equal(to_numpy(one), to_numpy(other))
