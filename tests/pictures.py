"""How alike two pictures are, and what a PNG holds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 pictures, dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def open_png(path: Path) -> PngImageFile:
    """With its ``text``, which other kinds of images do not have."""
    image = Image.open(path)
    assert isinstance(image, PngImageFile)
    return image
