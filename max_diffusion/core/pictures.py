"""Pictures that requests bring, as pixels, and what becomes of them before encoding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Final, final

import numpy as np

from ..errors import RequestError
from .validation import finite

MAX_PIXELS: Final = 2**26
"""Most pixels of a picture that is read: 8192 x 8192."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """The pixels of a picture; two are equal if their pixels are.

    Raises:
        RequestError: The array is of another dtype or shape, or too large.
    """

    pixels: np.ndarray
    """uint8 ``(H, W, 3)``, or ``(H, W, 1)`` of shades of gray; read-only, and so
    copied unless it is that and owns its memory."""
    name: str = "image"
    """What messages call it: its file's name, say."""

    def __post_init__(self) -> None:
        """Takes a copy of the pixels that others may change."""
        pixels = self.pixels
        is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
        if not is_array or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            got = getattr(pixels, "dtype", type(pixels).__name__)
            raise RequestError(
                f"{self.name}: pixels must be uint8 of shape (H, W, 3) or (H, W, 1), "
                f"got {got} {list(getattr(pixels, 'shape', ()))}"
            )
        check_pixels(self.name, self.width, self.height)
        is_own = pixels.flags.owndata and not pixels.flags.writeable
        if not (is_own and pixels.flags.c_contiguous):
            pixels = np.array(pixels, order="C")
            pixels.flags.writeable = False
        object.__setattr__(self, "pixels", pixels)

    @property
    def height(self) -> int:
        """Height in pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Width in pixels."""
        return int(self.pixels.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the size and the pixels, in hexadecimal."""
        found = hashlib.sha256(f"{self.pixels.shape}".encode())
        found.update(self.pixels.data)  # which makes no copy
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether the other one is a picture of the same pixels."""
        return isinstance(other, Picture) and self.digest == other.digest

    def __hash__(self) -> int:
        """Hash of the pixels."""
        return hash(self.digest)

    def __repr__(self) -> str:
        """What it is, without its pixels."""
        return f"Picture({self.name!r}, {self.width} x {self.height})"

    def scaled(self, height: int, width: int) -> np.ndarray:
        """Returns the picture at a size, float32 ``(1, H, W, 3)`` in -1..1.

        As diffusers' ``VaeImageProcessor`` scales: by Lanczos' filter, in 8 bits.
        """
        pixels = _resized(self.pixels, height, width).astype(np.float32) / 255.0
        scaled = 2.0 * pixels - 1.0
        return np.ascontiguousarray(np.broadcast_to(scaled, (1, height, width, 3)))

    def marked(self, height: int, width: int) -> np.ndarray:
        """Returns what the picture marks as a mask, bool ``(H, W)``: its lighter half.

        Scaled as it is, then made gray, as diffusers' processor of masks does.
        """
        from PIL import Image

        pixels = _resized(self.pixels, height, width)
        if pixels.shape[2] == 3:
            gray = np.asarray(Image.fromarray(pixels).convert("L"))
        else:
            gray = pixels[..., 0]
        return np.asarray(gray.astype(np.float32) / 255.0 >= 0.5)


@final
@dataclass(frozen=True)
class PictureInputs:
    """The pictures that a request starts from, and how.

    Raises:
        RequestError: There is no picture, the mask is of another size, or the strength
            is out of range.
    """

    images: tuple[Picture, ...]
    """One picture; several for models that take them."""
    mask: Picture | None = None
    """What is drawn anew, where it is light; all the rest of the picture is kept. Of
    the size of the first picture."""
    strength: float | None = None
    """How much of the schedule is run, above 0 to 1, where the picture is lost in the
    noise; ``None`` is the model's default."""

    def __post_init__(self) -> None:
        """Checks what needs no model."""
        is_tuple = isinstance(self.images, tuple) and self.images
        pictures = (*self.images, *((self.mask,) if self.mask else ()))
        if not is_tuple or not all(isinstance(each, Picture) for each in pictures):
            raise RequestError(
                "request: image must be a picture or several, and mask one, got "
                f"{self.images!r} and {self.mask!r}"
            )
        if self.mask is not None:
            image, mask = self.images[0], self.mask
            if (image.width, image.height) != (mask.width, mask.height):
                raise RequestError(
                    f"request: mask must be of the image's size, {image.width} x "
                    f"{image.height}, got {mask.width} x {mask.height}; scale it first"
                )
        if self.strength is not None:
            strength = finite("request: strength", self.strength)
            if not 0 < strength <= 1:
                raise RequestError(
                    "request: strength must be above 0, where the picture stays as it "
                    f"is, and at most 1, where nothing of it stays, got {strength:g}"
                )

    def default_size(
        self, area: int, cell: int, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """Returns the height and width to draw where a request leaves one open.

        They are the first picture's, each rounded down to a multiple of ``cell``; of
        one with more pixels than ``area``, they are those of that many in its shape.
        Where one is given, the other follows from the picture's shape.

        Args:
            area: Pixels of the size that the model draws by default.
            cell: Pixels a side of an image token.
            height: Of the request.
            width: Of the request.

        Raises:
            RequestError: A side is less than a cell.
        """
        image = self.images[0]
        if height is not None:
            factor = height / image.height
        elif width is not None:
            factor = width / image.width
        else:
            factor = min(1.0, math.sqrt(area / (image.height * image.width)))
        sides = []
        for given, own in ((height, image.height), (width, image.width)):
            # A side that comes out whole must not fall below itself by rounding.
            side = int(own * factor + 1e-6) // cell * cell if given is None else given
            if side < cell and given is None:
                raise RequestError(
                    f"request: {image.name} of {image.width} x {image.height} would be "
                    f"drawn less than {cell} pixels a side; give height and width"
                )
            sides.append(side)
        return sides[0], sides[1]


def nearest_in_shape(
    height: int, width: int, sizes: Collection[tuple[int, int]]
) -> tuple[int, int]:
    """Returns the one of some sizes whose width over height is nearest to a size's.

    Of two as near the narrower, as diffusers chooses for FLUX.1-Kontext.

    Args:
        height: Of the size.
        width: Of the size.
        sizes: Height and width of each.
    """
    return min(
        sizes, key=lambda size: (abs(width / height - size[1] / size[0]), size[::-1])
    )


def check_pixels(name: str, width: int, height: int) -> None:
    """Refuses a picture that is too large to be read.

    Args:
        name: What messages call it.
        width: In pixels.
        height: In pixels.

    Raises:
        RequestError: It has more than :data:`MAX_PIXELS`, or none.
    """
    if not 0 < width * height <= MAX_PIXELS:
        raise RequestError(
            f"{name}: a picture must have 1 to {MAX_PIXELS} pixels, got {width} x "
            f"{height}; scale it down"
        )


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales uint8 ``(H, W, C)`` by Lanczos' filter."""
    from PIL import Image

    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    scaled = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    return scaled.reshape(height, width, pixels.shape[2])
