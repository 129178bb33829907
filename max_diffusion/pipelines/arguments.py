"""Arguments of ``generate`` that may have several forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core.pictures import PictureInputs

if TYPE_CHECKING:
    from ..media.pictures import PictureLike


def picture_inputs(
    image: PictureLike | Sequence[PictureLike] | None,
    mask: PictureLike | None,
    strength: float | None,
) -> PictureInputs | None:
    """A call's pictures; Pillow is only imported for a call that has some."""
    if image is None and mask is None and strength is None:
        return None
    from ..media.pictures import read_inputs

    return read_inputs(image, mask, strength)
