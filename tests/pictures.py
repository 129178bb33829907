"""Pictures to start from, how alike two pictures are, and what a PNG holds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest error of an array, over the reference's largest value."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of uint8 pictures, dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def open_png(path: Path) -> PngImageFile:
    """With its ``text``, which other kinds of images do not have."""
    image = Image.open(path)
    assert isinstance(image, PngImageFile)
    return image


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The lowest of the pictures' PSNR."""
    assert ours.shape == theirs.shape
    return min(psnr(a, b) for a, b in zip(ours, theirs, strict=True))


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with some noise on them."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [
        127 * (1 + np.sin(rows / (5 + i) + columns / (7 + 2 * i) + i)) for i in range(3)
    ]
    noisy = np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def mask_of(height: int, width: int) -> Image.Image:
    """A light ellipse with a soft edge, in RGB."""
    rows, columns = np.mgrid[:height, :width]
    place = ((rows / height - 0.4) / 0.3) ** 2 + ((columns / width - 0.6) / 0.35) ** 2
    shade = (255 * (1.5 - place).clip(0, 1)).astype(np.uint8)
    return Image.fromarray(np.stack([shade, shade // 2 + 60, shade], axis=-1))
