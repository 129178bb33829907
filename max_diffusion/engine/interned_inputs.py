"""Inputs of equal contents become one buffer, so that calls with them can be one."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, final

from max.driver import Buffer

from ..core.buffers import to_numpy
from ..denoising.loop import Denoising
from ..pipelines.text_to_image import TextToImagePipeline

_MAX_KEPT: Final = 64


@final
class InternedInputs:
    """Inputs without a batch axis, such as tables of positions, by their contents.

    Calls can be one only if these are the very same buffers, so requests of the same
    size are given the same ones. An engine has one of its own, which keeps the 64
    buffers that were used last.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], Buffer] = OrderedDict()

    def intern(self, pipeline: TextToImagePipeline, denoising: Denoising) -> None:
        """Replaces the inputs of a loop that are known already, and keeps the others.

        Args:
            pipeline: Says which inputs have a batch axis; these are let be.
            denoising: Whose branches' inputs are replaced.
        """
        denoiser = pipeline.denoiser
        if denoiser is None:
            return
        denoising.branches = tuple(
            replace(
                branch, inputs=self._interned(branch.inputs, denoiser.inputs.batched)
            )
            for branch in denoising.branches
        )

    def _interned(
        self, inputs: Mapping[str, Buffer], batched: frozenset[str]
    ) -> dict[str, Buffer]:
        return {
            name: value if name in batched else self._one_of(value)
            for name, value in inputs.items()
        }

    def _one_of(self, value: Buffer) -> Buffer:
        digest = hashlib.sha256(to_numpy(value).tobytes()).digest()
        key = (tuple(value.shape), value.dtype, digest)
        known = self._kept.setdefault(key, value)
        self._kept.move_to_end(key)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return known
