"""Requests that start from a picture: what is checked, drawn and encoded for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from max.driver import Buffer

from ..core.buffers import to_device
from ..core.grid import Grid
from ..core.pictures import PictureInputs
from ..core.request import GenerationContext, GenerationRequest, StartingPicture
from ..errors import RequestError
from ..sampling import KeptPicture, Schedule

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline


class AbstractPictures(ABC):
    """How a family starts from pictures; holds nothing of a request."""

    taken: frozenset[str]
    """What requests may bring of ``image``, ``mask`` and ``strength``. For masks, a
    picture component adds the graphs of
    :class:`~max_diffusion.sampling.KeptPicture`."""
    max_pictures: int = 1
    """Most pictures of a request."""
    default_strength: float = 0.6
    """How much of the schedule is run from a picture where a request leaves that
    open."""

    @abstractmethod
    def check_weights(self) -> None:
        """Raises :class:`RequestError` where the files have nothing that encodes."""

    @abstractmethod
    def start(
        self, request: GenerationRequest, inputs: PictureInputs, grid: Grid
    ) -> tuple[np.ndarray, StartingPicture]:
        """The noise and the picture of a request that starts from one.

        Args:
            request: What is drawn.
            inputs: Its pictures.
            grid: Of the image tokens.

        Returns:
            The seeded noise, packed, float32 ``(B, S_img, C)``, and the picture.
        """

    @abstractmethod
    def encode(self, start: StartingPicture) -> np.ndarray:
        """Encodes a picture.

        Returns:
            Its latents without noise, packed: float32 ``(1 or B, S_img, C)``.
        """

    @abstractmethod
    def encode_bytes(self, height: int, width: int) -> int:
        """Bytes that :meth:`encode` takes while it runs, of a size in pixels."""


@dataclass(frozen=True)
class DrawnSize:
    """Height and width of what is drawn."""

    height: int | None
    """Pixels; ``None`` is the model's default."""
    width: int | None
    """Pixels; ``None`` is the model's default."""
    sources: Mapping[str, str]
    """Where a side comes from that the request left open."""


def check_inputs(pipeline: TextToImagePipeline, request: GenerationRequest) -> None:
    """Refuses pictures that the model cannot start from, before anything compiles.

    Raises:
        RequestError: The model does not take one of them, or takes fewer; its files
            have no encoder; or the encoder's graphs may not be compiled now.
    """
    inputs = request.inputs
    if inputs is None:
        return
    owner = pipeline.pipeline_config.class_name or type(pipeline).__name__
    pictures = pipeline.pictures
    taken = frozenset() if pictures is None else pictures.taken
    given = {
        "image": inputs.images,
        "mask": inputs.mask,
        "strength": inputs.strength,
    }
    for name, value in given.items():
        if value is not None and name not in taken:
            has = ", ".join(sorted(taken)) or "nothing but text"
            raise RequestError(
                f"request: {name} is no input of {owner}, which takes {has}; leave it "
                "out, or take another model"
            )
    count = len(inputs.images)
    assert pictures is not None, "an image is refused above"
    if count > pictures.max_pictures:
        raise RequestError(
            f"request: image must be at most {pictures.max_pictures} for {owner}, got "
            f"{count} pictures"
        )
    pictures.check_weights()
    if not pipeline.graphs.has_pictures and not pipeline.pipeline_config.is_extensible:
        raise RequestError(
            "request: image needs graphs that were not compiled with the model; load "
            "it with takes_pictures, start a server with --pictures"
        )


def drawn_size(pipeline: TextToImagePipeline, request: GenerationRequest) -> DrawnSize:
    """Returns the size to draw: of a picture's own where the request names none.

    Raises:
        RequestError: The picture is less than a cell.
    """
    height, width, inputs = request.height, request.width, request.inputs
    is_open = {"height": height is None, "width": width is None}
    if inputs is None or not any(is_open.values()):
        return DrawnSize(height, width, {})
    default_height, default_width = pipeline.default_size
    area = default_height * default_width
    sides = inputs.default_size(area, pipeline.cell, height, width)
    return DrawnSize(*sides, {name: "image" for name, left in is_open.items() if left})


def strength_of(
    pipeline: TextToImagePipeline, request: GenerationRequest
) -> float | None:
    """How much of the schedule is run; ``None`` where all of it is."""
    pictures = pipeline.pictures
    if request.inputs is None or pictures is None or "strength" not in pictures.taken:
        return None
    strength = request.inputs.strength
    return pictures.default_strength if strength is None else strength


def remaining(schedule: Schedule, strength: float | None) -> Schedule:
    """The end of a schedule that a strength leaves over, as diffusers counts it.

    Raises:
        RequestError: It leaves no step.
    """
    if strength is None:
        return schedule
    steps = schedule.num_steps
    first = int(max(steps - min(steps * strength, steps), 0))
    if first == steps:
        raise RequestError(
            f"request: strength must leave at least one of {steps} steps, got "
            f"{strength:g}; give more of it, or more steps"
        )
    return schedule.after(first)


def packed_mask(inputs: PictureInputs, cell: int, size: tuple[int, int]) -> np.ndarray:
    """The mask of latent cells as tokens of two by two, as diffusers makes it.

    Args:
        inputs: With a mask.
        cell: Pixels a side of a token.
        size: Height and width in pixels of what is drawn.

    Returns:
        float32 ``(S_img, 4)``: 1 in a cell whose first pixel is marked.
    """
    assert inputs.mask is not None
    cells = inputs.mask.marked(*size)[:: cell // 2, :: cell // 2]
    rows, columns = size[0] // cell, size[1] // cell
    tokens = cells.reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3)
    return tokens.reshape(rows * columns, 4).astype(np.float32)


def begin_from_picture(
    pipeline: TextToImagePipeline, context: GenerationContext
) -> tuple[Buffer, KeptPicture | None]:
    """Encodes the picture and noises it to where its schedule begins.

    Returns:
        Latents, float32 ``(B, S_img, C)``, and what is kept of the picture, if a mask
        says so.
    """
    start, noise, pictures = context.start, context.latents, pipeline.pictures
    assert start is not None and pictures is not None
    pipeline.graphs.require_pictures()
    clean = np.broadcast_to(pictures.encode(start), noise.shape)
    sigma = context.sigmas[0]
    latents = to_device(
        sigma * noise + (np.float32(1) - sigma) * clean, pipeline.device
    )
    if start.mask is None:
        return latents, None
    mask = np.broadcast_to(start.mask, noise.shape)
    device = pipeline.device
    buffers = [to_device(array, device) for array in (clean, noise, mask)]
    return latents, KeptPicture(buffers[0], buffers[1], buffers[2], device)
