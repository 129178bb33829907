"""Requests that start from a picture: what is checked, drawn and encoded for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from max.driver import Buffer

from ..core.buffers import to_device
from ..core.grid import Grid
from ..core.options import RequestOptions
from ..core.pictures import PictureInputs
from ..core.request import (
    GenerationContext,
    GenerationRequest,
    GivenPictures,
    PictureToEncode,
)
from ..denoising.step_inputs import REFERENCE
from ..errors import RequestError
from ..sampling import KeptPicture, Schedule

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline


class AbstractPictures(ABC):
    """What a family does with the pictures of requests; holds nothing of any."""

    taken: frozenset[str]
    """What requests may bring of ``image``, ``mask`` and ``strength``. For masks of
    what is kept, a picture component adds the graphs of
    :class:`~max_diffusion.sampling.KeptPicture`."""
    needed: frozenset[str] = frozenset()
    """What of it every request must bring."""
    max_pictures: int = 1
    """Most pictures of a request."""
    instead_of_more: str = "send one"
    """What to do in place of sending more."""
    preferred_sizes: tuple[tuple[int, int], ...] = ()
    """Heights and widths of which the nearest in shape is drawn where a request with a
    picture names no size; none where its own is."""
    most_read_pixels: int | None = None
    """Most pixels of each picture, of models that read them at their own sizes."""
    default_strength: float = 0.6
    """How much of the schedule is run from a picture where a request leaves that
    open."""

    @abstractmethod
    def check_weights(self) -> None:
        """Raises :class:`RequestError` where the files have nothing that encodes."""

    def drawn_size(
        self,
        request: GenerationRequest,
        options: RequestOptions,
        default: tuple[int, int],
        cell: int,
    ) -> tuple[int | None, int | None]:
        """The height and width to draw; ``None`` is the model's default.

        Where a request leaves one open, it is of its picture's shape.

        Args:
            request: What is drawn.
            options: Of the request.
            default: Height and width of the model's own in pixels.
            cell: Pixels a side of an image token.

        Raises:
            RequestError: The picture is less than a cell.
        """
        height, width, inputs = request.height, request.width, request.inputs
        if inputs is None or None not in (height, width):
            return height, width
        return inputs.default_size(default[0] * default[1], cell, height, width)

    def references(
        self, sizes: Sequence[tuple[int, int]], options: RequestOptions
    ) -> tuple[Grid, ...]:
        """How the tokens of each reference are arranged, of models that read some.

        Args:
            sizes: Height and width in pixels of each picture of a request.
            options: Of the request.

        Raises:
            RequestError: A picture is less than a cell.
        """
        return ()

    @abstractmethod
    def start(
        self,
        request: GenerationRequest,
        inputs: PictureInputs,
        grid: Grid,
        references: tuple[Grid, ...],
    ) -> tuple[np.ndarray, GivenPictures]:
        """The noise and the pictures of a request that brings some.

        Args:
            request: What is drawn.
            inputs: Its pictures.
            grid: Of the image tokens.
            references: From :meth:`references`.

        Returns:
            The seeded noise, packed, float32 ``(B, S_img, C)``, and the pictures.
        """

    @abstractmethod
    def encode(self, picture: PictureToEncode) -> np.ndarray:
        """Encodes a picture.

        Returns:
            Its latents without noise, packed: float32 ``(1 or B, S, C)``.
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
        RequestError: The model does not take one of them, takes fewer, or needs more;
            its files have no encoder; or the encoder's graphs may not be compiled now.
    """
    inputs = request.inputs
    owner = pipeline.pipeline_config.class_name or type(pipeline).__name__
    pictures = pipeline.pictures
    given: dict[str, object] = {}
    if inputs is not None:
        given = {
            "image": inputs.images,
            "mask": inputs.mask,
            "strength": inputs.strength,
        }
    needed = () if pictures is None else sorted(pictures.needed)
    missing = [name for name in needed if given.get(name) is None]
    if missing:
        raise RequestError(
            f"request: {owner} draws from {' and '.join(needed)}, and there is no "
            f"{' and no '.join(missing)}; give it, or take another model"
        )
    if inputs is None:
        return
    taken = frozenset() if pictures is None else pictures.taken
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
            f"{count} pictures; {pictures.instead_of_more}"
        )
    pictures.check_weights()
    if not pipeline.graphs.has_pictures and not pipeline.pipeline_config.is_extensible:
        raise RequestError(
            "request: image needs graphs that were not compiled with the model; load "
            "it with takes_pictures, start a server with --pictures"
        )


def drawn_size(
    pipeline: TextToImagePipeline, request: GenerationRequest, options: RequestOptions
) -> DrawnSize:
    """Returns the size to draw: of a picture's shape where the request names none.

    Raises:
        RequestError: The picture is less than a cell.
    """
    asked, pictures = (
        {"height": request.height, "width": request.width},
        pipeline.pictures,
    )
    if pictures is None:
        return DrawnSize(request.height, request.width, {})
    size = pictures.drawn_size(request, options, pipeline.default_size, pipeline.cell)
    source = "image" if request.inputs is not None else "options"
    sides = zip(asked.items(), size, strict=True)
    found = {
        n: source for (n, value), own in sides if value is None and own is not None
    }
    return DrawnSize(*size, found)


def reference_grids(
    pipeline: TextToImagePipeline, request: GenerationRequest, options: RequestOptions
) -> tuple[Grid, ...]:
    """How the tokens of each reference picture are arranged.

    Raises:
        RequestError: A picture is less than a cell.
    """
    if pipeline.pictures is None or request.inputs is None:
        return ()
    sizes = [(image.height, image.width) for image in request.inputs.images]
    return pipeline.pictures.references(sizes, options)


def strength_of(
    pipeline: TextToImagePipeline, request: GenerationRequest
) -> float | None:
    """How much of the schedule is run; ``None`` where all of it is."""
    if request.inputs is None:
        return None
    pictures = pipeline.pictures
    if pictures is None or "strength" not in pictures.taken:
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
    return schedule.after(_skipped_steps(schedule.num_steps, strength))


def steps_run(
    pipeline: TextToImagePipeline, request: GenerationRequest, num_inference_steps: int
) -> int:
    """How many steps of a whole schedule are run for a request.

    Args:
        pipeline: What draws it.
        request: Its pictures say it.
        num_inference_steps: Of the whole schedule, whatever the request has.

    Raises:
        RequestError: It is none.
    """
    strength = strength_of(pipeline, request)
    if strength is None:
        return num_inference_steps
    return num_inference_steps - _skipped_steps(num_inference_steps, strength)


def _skipped_steps(steps: int, strength: float) -> int:
    """Steps at the beginning of a schedule that a strength leaves out."""
    skipped = int(max(steps - min(steps * strength, steps), 0))
    if skipped == steps:
        raise RequestError(
            f"request: strength must leave at least one of {steps} steps, got "
            f"{strength:g}; give more of it, or more steps"
        )
    return skipped


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


@dataclass(frozen=True)
class Begun:
    """What a request's pictures make of its beginning."""

    latents: Buffer
    """float32 ``(B, S_img, C)``: noise, or the picture noised to where its schedule
    begins."""
    kept: KeptPicture | None = None
    """What is put back after each step, if a mask says so."""
    inputs: Mapping[str, Buffer] = field(default_factory=dict)
    """Inputs of the transformer, the same of all steps and branches."""


def begin_from_pictures(
    pipeline: TextToImagePipeline, context: GenerationContext
) -> Begun:
    """Encodes the pictures, and puts each where it is used."""
    given, noise, pictures = context.given, context.latents, pipeline.pictures
    assert given is not None and pictures is not None
    pipeline.graphs.require_pictures()
    device, inputs = pipeline.device, {}

    def encoded(picture: PictureToEncode) -> np.ndarray:
        """Of each sample."""
        latents = pictures.encode(picture)
        return np.broadcast_to(latents, (len(noise), *latents.shape[1:]))

    if given.references:
        tokens = np.concatenate([encoded(each) for each in given.references], axis=1)
        inputs[REFERENCE] = to_device(tokens, device)
    if given.known is not None:
        latents, mask = encoded(given.known.picture), given.known.mask
        mask = np.broadcast_to(mask, (len(noise), *mask.shape))
        inputs["known"] = to_device(np.concatenate([latents, mask], axis=-1), device)
    sigma = context.sigmas[0]
    is_lost = given.kept_mask is None and sigma == 1
    if given.start is None or is_lost:
        return Begun(to_device(noise, device), inputs=inputs)
    clean = encoded(given.start)
    latents = sigma * noise + (np.float32(1) - sigma) * clean
    kept = None
    if given.kept_mask is not None:
        mask = np.broadcast_to(given.kept_mask, noise.shape)
        buffers = [to_device(array, device) for array in (clean, noise, mask)]
        kept = KeptPicture(buffers[0], buffers[1], buffers[2], device)
    return Begun(to_device(latents, device), kept, inputs)
