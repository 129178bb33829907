"""Arguments of ``generate`` that may have several forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..caches import (
    AbstractCacheConfig,
    DenoisingCacheConfig,
    cache_from_options,
)
from ..core.pictures import PictureInputs

if TYPE_CHECKING:
    from ..media.pictures import PictureLike
    from .text_to_image import TextToImagePipeline


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


def cache_config(
    pipeline: TextToImagePipeline,
    cache: str | DenoisingCacheConfig | AbstractCacheConfig | None,
) -> AbstractCacheConfig | None:
    """A call's cache in any form; ``None`` stays the pipeline's."""
    if cache is None:
        return None
    if isinstance(cache, str):
        return cache_from_options(cache)
    return pipeline.caches.resolve(cache)
