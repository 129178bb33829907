"""Metrics of pictures, against their definitions in NumPy."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pictures
import pytest
from onnx import TensorProto, helper, numpy_helper

from max_diffusion import RequestError
from max_diffusion.evaluation import Lpips, flicker, psnr, ssim
from max_diffusion.evaluation.metrics import by_frame, mean_psnr

SIZES = [(11, 11), (17, 23), (41, 16), (33, 64)]


def random_pair(size: tuple[int, int], spread: int = 40) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(size)
    reference = rng.integers(0, 256, (*size, 3))
    picture = np.clip(reference + rng.integers(-spread, spread + 1, (*size, 3)), 0, 255)
    return picture.astype(np.uint8), reference.astype(np.uint8)


def ssim_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al., 2004, equation 13, at each place where the window fits."""
    away = np.arange(-5, 6)
    window = np.exp(-(away[:, None] ** 2 + away[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        patches = np.lib.stride_tricks.sliding_window_view(values, (11, 11), (0, 1))
        return np.einsum("hwcij,ij->hwc", patches, window)

    x, y = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    likeness = (2 * mx * my + c1) * (2 * vxy + c2)
    return float(np.mean(likeness / ((mx**2 + my**2 + c1) * (vx + vy + c2))))


@pytest.mark.parametrize("size", SIZES)
def test_psnr_is_the_definition(size: tuple[int, int]) -> None:
    picture, reference = random_pair(size)
    assert psnr(picture, reference) == pytest.approx(pictures.psnr(picture, reference))


def test_psnr_of_known_errors() -> None:
    black, white = np.zeros((2, 3, 3), np.uint8), np.full((2, 3, 3), 255, np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(white, black) == psnr(black, white) == pytest.approx(0.0)
    one_off = black.copy()
    one_off[1, 2, 0] = 1
    assert psnr(one_off, black) == pytest.approx(20 * math.log10(255) + 12.5527, 1e-6)


@pytest.mark.parametrize("spread", [1, 40, 255])
@pytest.mark.parametrize("size", SIZES)
def test_ssim_is_the_definition(size: tuple[int, int], spread: int) -> None:
    picture, reference = random_pair(size, spread)
    wanted = ssim_by_definition(picture, reference)
    assert ssim(picture, reference) == pytest.approx(wanted, abs=1e-9)
    assert ssim(reference, picture) == pytest.approx(wanted, abs=1e-9)


def test_ssim_of_equal_and_of_opposite_pictures() -> None:
    picture, _ = random_pair((16, 16))
    assert ssim(picture, picture) == 1.0
    assert ssim(255 - picture, picture) < 0


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((16, 16, 3), np.float32), "expected uint8 (H, W, 3), got float32"),
        (np.zeros((16, 16), np.uint8), "expected uint8 (H, W, 3), got uint8 (16, 16)"),
        (np.zeros((16, 16, 4), np.uint8), "got uint8 (16, 16, 4)"),
        (np.zeros((16, 15, 3), np.uint8), "pictures of one size, got"),
    ],
)
def test_what_is_no_pair_of_pictures_is_an_error(
    metric: Any, picture: np.ndarray, message: str
) -> None:
    other = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(RequestError, match=re.escape(message)):
        metric(picture, other)
    if picture.dtype == np.uint8:
        with pytest.raises(RequestError, match=re.escape(message.partition(",")[0])):
            metric(other, picture)


def test_ssim_needs_room_for_its_window() -> None:
    picture = np.zeros((32, 10, 3), np.uint8)
    with pytest.raises(RequestError, match="11 pixels a side or more"):
        ssim(picture, picture)
    assert psnr(picture, picture) == math.inf


# Videos.


def grays(*levels: int, size: int = 12) -> np.ndarray:
    """A video with a frame of each gray."""
    return np.repeat(np.array(levels, np.uint8), 3 * size**2).reshape(-1, size, size, 3)


def test_metrics_of_a_video_are_its_frames() -> None:
    video, reference = grays(100, 101, 105), grays(100, 100, 100)
    found = by_frame(psnr, video, reference)
    # Squared errors of 0, 1 and 25.
    assert found == pytest.approx((math.inf, 20 * math.log10(255), 20 * math.log10(51)))
    likeness = by_frame(ssim, video, reference)
    assert likeness == tuple(map(ssim, video, reference))
    assert likeness[0] == 1 > likeness[1] > likeness[2]
    assert by_frame(psnr, video[1:2], reference[1:2]) == (psnr(video[1], reference[1]),)


def test_a_mean_psnr_is_of_the_mean_error() -> None:
    video, reference = grays(100, 101, 105), grays(100, 100, 100)
    found = mean_psnr(by_frame(psnr, video, reference))
    assert found == pytest.approx(10 * math.log10(255**2 / ((0 + 1 + 25) / 3)))
    assert found == pytest.approx(pictures.psnr(video, reference))
    assert mean_psnr(by_frame(psnr, video, video)) == math.inf
    assert mean_psnr([30.0]) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        ((50, 60, 80), 0.0),
        ((57, 67, 87), 0.0),  # the same is wrong in all
        ((50, 61, 85), (1 + 4) / 2),  # errors of 0, 1 and 5
        ((50, 61, 75), (1 + 6) / 2),  # of 0, 1 and -5
        ((60, 50, 80), (20 + 10) / 2),  # shuffled: of 10, -10 and 0
        ((80, 60, 50), (30 + 30) / 2),  # backwards: of 30, 0 and -30
        ((50, 50, 50), (10 + 20) / 2),  # standing still
    ],
)
def test_flicker_is_what_changes_otherwise(
    levels: tuple[int, ...], wanted: float
) -> None:
    reference = grays(50, 60, 80)
    assert flicker(grays(*levels), reference) == wanted
    assert flicker(reference, grays(*levels)) == wanted


def test_flicker_has_no_overflow_and_is_the_mean_of_all_values() -> None:
    video, reference = grays(255, 0), grays(0, 255)
    assert flicker(video, reference) == 510
    video[:, 6:] = reference[:, 6:]  # the lower half
    assert flicker(video, reference) == 255


def test_shuffled_frames_flicker_though_they_are_the_same() -> None:
    rng = np.random.default_rng(1)
    video = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    assert (flicker(video, video), min(by_frame(psnr, video, video))) == (0, math.inf)
    assert flicker(video[[0, 2, 1, 3, 4]], video) > 10


def test_an_image_does_not_flicker() -> None:
    assert flicker(grays(0), grays(255)) == 0.0


@pytest.mark.parametrize("measure", [flicker, lambda *pair: by_frame(psnr, *pair)])
def test_videos_must_be_of_as_many_frames_and_one_size(measure: Any) -> None:
    with pytest.raises(RequestError, match="videos of as many frames, got 2 and 3"):
        measure(grays(1, 2), grays(1, 2, 3))
    with pytest.raises(RequestError, match="expected pictures of one size"):
        measure(grays(1, 2), grays(1, 2, size=13))


# LPIPS, with a network of one convolution: the mean squared difference after it.

KERNEL = np.random.default_rng(3).standard_normal((4, 3, 3, 3)).astype(np.float32)


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    *,
    inputs: Sequence[str] = ("first", "second"),
    outputs: Sequence[str] = ("distance",),
    height: str | int = "height",
) -> Path:
    shape = (1, 3, height, "width")
    graph = helper.make_graph(
        nodes,
        "distance",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(KERNEL, "kernel")],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def network(path: Path, **options: Any) -> Path:
    last = options.get("inputs", ("first", "second"))[-1]
    nodes = [
        helper.make_node("Conv", ["first", "kernel"], ["a"]),
        helper.make_node("Conv", [last, "kernel"], ["b"]),
        helper.make_node("Sub", ["a", "b"], ["error"]),
        helper.make_node("Mul", ["error", "error"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["distance"], keepdims=1),
    ]
    return saved(path, nodes, **options)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The same in float64."""
    maps = []
    for image in (a, b):
        scaled = image.astype(np.float64) / 255 * 2 - 1
        patches = np.lib.stride_tricks.sliding_window_view(scaled, (3, 3), (0, 1))
        maps.append(np.einsum("hwcij,ocij->hwo", patches, KERNEL.astype(np.float64)))
    return float(np.mean((maps[0] - maps[1]) ** 2))


@pytest.mark.parametrize("size", [(16, 16), (9, 31)])
def test_lpips_is_what_the_network_says(tmp_path: Path, size: tuple[int, int]) -> None:
    lpips = Lpips(network(tmp_path / "net.onnx"))
    picture, reference = random_pair(size)
    assert lpips(picture, reference) == pytest.approx(
        distance(picture, reference), rel=1e-5
    )
    assert lpips(picture, picture) == 0.0


def test_lpips_gives_pictures_in_their_order(tmp_path: Path) -> None:
    first = helper.make_node("ReduceMean", ["first"], ["distance"], keepdims=0)
    lpips = Lpips(str(saved(tmp_path / "net.onnx", [first])))
    white, black = np.full((8, 8, 3), 255, np.uint8), np.zeros((8, 8, 3), np.uint8)
    assert (lpips(white, black), lpips(black, white)) == (1.0, -1.0)


def test_lpips_checks_its_pictures(tmp_path: Path) -> None:
    lpips = Lpips(network(tmp_path / "net.onnx"))
    with pytest.raises(RequestError, match="pictures of one size"):
        lpips(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 15, 3), np.uint8))


def test_lpips_of_no_file_or_no_network_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"net\.onnx is no file; give an ONNX"):
        Lpips(tmp_path / "net.onnx")
    with pytest.raises(RequestError, match="is no file"):
        Lpips(tmp_path)
    (tmp_path / "net.onnx").write_text("no network")
    with pytest.raises(RequestError, match=r"net\.onnx is no ONNX network: .") as error:
        Lpips(tmp_path / "net.onnx")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inputs", [["first"], ["first", "third", "second"]])
def test_lpips_needs_a_network_of_two_pictures(
    tmp_path: Path, inputs: list[str]
) -> None:
    path = network(tmp_path / "net.onnx", inputs=inputs)
    with pytest.raises(
        RequestError, match=r"network of two pictures, got.* inputs first"
    ):
        Lpips(path)


def test_lpips_needs_one_number(tmp_path: Path) -> None:
    pair = random_pair((16, 16))
    many = Lpips(network(tmp_path / "many.onnx", outputs=["square"]))
    with pytest.raises(RequestError, match=r"one number, got \[\(1, 4, 14, 14\)\]"):
        many(*pair)
    two = Lpips(network(tmp_path / "two.onnx", outputs=["distance", "error"]))
    with pytest.raises(RequestError, match=r"one number, got \[\(1, 1, 1, 1\), "):
        two(*pair)


def test_lpips_says_which_size_a_network_does_not_take(tmp_path: Path) -> None:
    lpips = Lpips(network(tmp_path / "net.onnx", height=20))
    with pytest.raises(RequestError, match=r"net\.onnx does not take pictures") as err:
        lpips(*random_pair((16, 16)))
    assert "(1, 3, 16, 16)" in str(err.value)
    assert "\n" not in str(err.value)
    assert lpips(*random_pair((20, 16))) > 0


def test_lpips_without_its_package_tells_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RequestError, match=r'pip install "max-diffusion\[lpips\]"'):
        Lpips(tmp_path / "net.onnx")
