"""Pictures and masks as bodies of ``POST /v1/images/edits``, and of its answers."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def png(pixels: np.ndarray | Image.Image) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(height: int = 64, width: int = 96) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    waves = [127 * (1 + np.sin(rows / (6 + i) + columns / (9 + i))) for i in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def hole(height: int = 64, width: int = 96) -> Image.Image:
    """A mask as OpenAI's: the middle is transparent."""
    alpha = np.full((height, width), 255, np.uint8)
    alpha[16:48, 24:72] = 0
    return Image.fromarray(np.dstack([picture(height, width), alpha]))


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))
