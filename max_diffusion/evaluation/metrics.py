"""Metrics of how like two images, or two videos, are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ..errors import RequestError

_SSIM_WINDOW_PX: Final = 11


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Computes the peak signal to noise ratio in dB; infinite for equal images.

    Args:
        image: The image, uint8 ``(H, W, 3)``.
        reference: The image to compare with, of the same dtype and shape.
    """
    _check(image, reference)
    if np.array_equal(image, reference):
        return math.inf
    return float(peak_signal_noise_ratio(reference, image, data_range=255))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Computes the structural similarity, -1 to 1: the mean over pixels and channels.

    As defined by Wang et al., 2004, with a Gaussian window of 11 x 11 and sigma 1.5.

    Args:
        image: The image, uint8 ``(H, W, 3)``, at least 11 pixels a side.
        reference: The image to compare with, of the same dtype and shape.
    """
    _check(image, reference)
    if min(image.shape[:2]) < _SSIM_WINDOW_PX:
        raise RequestError(
            f"metrics: SSIM needs pictures of {_SSIM_WINDOW_PX} pixels a side or more, "
            f"got {image.shape}"
        )
    return float(
        structural_similarity(
            reference,
            image,
            channel_axis=-1,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def by_frame(
    metric: Callable[[np.ndarray, np.ndarray], float],
    frames: np.ndarray,
    reference: np.ndarray,
) -> tuple[float, ...]:
    """Computes a metric of two images for each frame of two videos.

    Args:
        metric: Function of an image and the one to compare with, :func:`psnr` say.
        frames: The video, uint8 ``(F, H, W, 3)``; an image is one frame.
        reference: The video to compare with, of the same dtype and shape.

    Returns:
        One value per frame.
    """
    _check_count(frames, reference)
    return tuple(map(metric, frames, reference))


def mean_psnr(values: Sequence[float]) -> float:
    """Computes the PSNR in dB of the mean squared error of some images together.

    That is the PSNR of a video as one array. A mean of decibels would be infinite as
    soon as one frame is equal; this is only where all are.

    Args:
        values: PSNR of each image in dB.
    """
    error = statistics.fmean(10 ** (-value / 10) for value in values)
    return -10 * math.log10(error) if error else math.inf


def flicker(frames: np.ndarray, reference: np.ndarray) -> float:
    """Computes how much a video changes otherwise than another from frame to frame.

    The mean over frames, pixels and channels of ``|(c[t+1] - c[t]) - (u[t+1] - u[t])|``
    in levels of 255, ``c`` the video and ``u`` the one to compare with: 0 for equal
    videos, for one frame, and where the same is wrong in all frames, which the other
    metrics tell.

    Args:
        frames: The video, uint8 ``(F, H, W, 3)``; an image is one frame.
        reference: The video to compare with, of the same dtype and shape.
    """
    _check_count(frames, reference)
    # A frame at a time: of all at once the errors would take twice the videos' memory.
    errors = map(_error, frames, reference)
    changes = [float(np.abs(now - before).mean()) for before, now in pairwise(errors)]
    return statistics.fmean(changes) if changes else 0.0


class Lpips:
    """Measures the distance of two images with a neural network; 0 for equal images.

    See Zhang et al., 2018, arXiv:1801.03924. No network comes with this package.

    Args:
        path: ONNX file of a network that takes two images, float32 ``(1, 3, H, W)``
            in [-1, 1], and returns their distance, one number: what exporting the
            ``lpips`` package's ``LPIPS`` module gives.

    Raises:
        RequestError: There is no such file, or it holds another kind of network.
    """

    def __init__(self, path: str | Path) -> None:
        where = f"lpips: {path}"
        try:
            import onnxruntime
        except ImportError as err:
            raise RequestError(
                'lpips: needs onnxruntime; pip install "max-diffusion[lpips]"'
            ) from err
        if not Path(path).is_file():
            raise RequestError(f"{where} is no file; give an ONNX network")
        try:
            self._session = onnxruntime.InferenceSession(
                path, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # its errors have no common class
            line = str(err).splitlines()[0]
            raise RequestError(f"{where} is no ONNX network: {line}") from err
        self._names = [item.name for item in self._session.get_inputs()]
        if len(self._names) != 2:
            raise RequestError(
                f"{where}: expected a network of two pictures, got one with the inputs "
                f"{', '.join(self._names)}"
            )
        self._where = where

    def __call__(self, image: np.ndarray, reference: np.ndarray) -> float:
        """Returns the distance of two images.

        Args:
            image: The image, uint8 ``(H, W, 3)``.
            reference: The image to compare with, of the same dtype and shape.

        Raises:
            RequestError: The network does not take images of this size, or returns
                something other than one number.
        """
        _check(image, reference)
        pair = [
            (one.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
            for one in (image, reference)
        ]
        try:
            found = self._session.run(None, dict(zip(self._names, pair, strict=True)))
        except Exception as err:
            line = str(err).splitlines()[0]
            raise RequestError(
                f"{self._where} does not take pictures {pair[0].shape}: {line}"
            ) from err
        if len(found) != 1 or np.size(found[0]) != 1:
            raise RequestError(
                f"{self._where}: expected one number, got "
                f"{[np.shape(item) for item in found]}"
            )
        return float(np.reshape(found[0], ()))


def _error(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Computes what an image is off, int16 ``(H, W, 3)``."""
    _check(image, reference)
    return np.subtract(image, reference, dtype=np.int16)


def _check_count(frames: np.ndarray, reference: np.ndarray) -> None:
    if len(frames) != len(reference):
        raise RequestError(
            "metrics: expected videos of as many frames, got "
            f"{len(frames)} and {len(reference)}"
        )


def _check(image: np.ndarray, reference: np.ndarray) -> None:
    for one in (image, reference):
        if one.dtype != np.uint8 or one.ndim != 3 or one.shape[2] != 3:
            raise RequestError(
                f"metrics: expected uint8 (H, W, 3), got {one.dtype} {one.shape}"
            )
    if image.shape != reference.shape:
        raise RequestError(
            "metrics: expected pictures of one size, got "
            f"{image.shape} and {reference.shape}"
        )
