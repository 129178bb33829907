"""The part of a picture that a mask keeps, from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from max.driver import Buffer, Device
from max.graph import DeviceRef, Module

from graphs.sampler import add_kept_picture

from ..execution.graph_call import SAMPLER, GraphCall, Routine

_GRAPH: Final = "keep_picture"


@final
@dataclass(frozen=True)
class KeptPicture:
    """A known picture, with the noise that its request started from.

    After every step, what the mask leaves out is put back at that step's noise level,
    as diffusers' inpainting does.
    """

    clean: Buffer
    """The picture's latents, float32 ``(B, S_img, C)``."""
    noise: Buffer
    """Of the same shape."""
    mask: Buffer
    """1 where is drawn, 0 where is kept; of the same shape."""
    device: Device

    @staticmethod
    def add_graphs(module: Module, device: DeviceRef) -> None:
        """Adds the graph that :meth:`restore` calls."""
        add_kept_picture(module, _GRAPH, device)

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return 3 * int(self.clean.num_elements) * int(self.clean.element_size)

    def restore(
        self, latents: Buffer, sigma: float, stage: int = SAMPLER
    ) -> Routine[Buffer]:
        """Puts the picture back where it is kept.

        Args:
            latents: After a step, float32 ``(B, S_img, C)``; not changed.
            sigma: Their noise level.
            stage: Stage of the graph call.
        """
        levels = np.full(int(latents.shape[0]), sigma, np.float32)
        inputs = latents, self.clean, self.noise, self.mask, levels
        outputs = yield GraphCall(
            _GRAPH,
            inputs,
            self.device,
            constant=frozenset((1, 2, 3)),
            stage=stage,
        )
        return outputs[0]
