"""Convolutions for CPUs against float64, over odd sizes; one compile for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from convolving import group_norm, pack
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, Module, TensorType
from torch.nn import functional

from graphs import convolutions, processor
from max_diffusion.execution.compiler import compiled_module
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.execution.matrix_unit import permitted_matrix_unit

FLOAT, HALF = DType.float32, DType.bfloat16
NUMBERS = {FLOAT: torch.float32, HALF: torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """What a graph computes, whatever the images' size."""

    inputs: int
    channels: int
    dtype: DType = FLOAT
    products: DType = FLOAT
    kernel: int = 3
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    groups: int = 0
    silu: bool = False
    upsample: bool = False
    bias: bool = True
    residual: bool = False


NONE = (0, 0, 0, 0)
LAYERS = {
    "plain": Layer(128, 128),
    "norm": Layer(64, 64, groups=32, silu=True, residual=True),
    "odd": Layer(7, 3, groups=7, silu=True),
    "one": Layer(1, 1, bias=False),
    "picture": Layer(3, 16),
    "few": Layer(96, 20, groups=4, residual=True),
    "long": Layer(513, 70, silu=True),
    "widest": Layer(1024, 65, groups=32, silu=True),
    "up": Layer(32, 48, upsample=True),
    "up norm": Layer(48, 130, upsample=True, groups=3, silu=True),
    "down": Layer(32, 32, stride=2, padding=(0, 1, 0, 1)),
    "down norm": Layer(20, 33, stride=2, padding=(1, 0, 1, 0), groups=5),
    "no padding": Layer(16, 64, padding=NONE),
    "strided": Layer(18, 64, stride=2, padding=NONE),
    "lopsided": Layer(17, 17, padding=(0, 1, 1, 0)),
    "point": Layer(24, 100, kernel=1, padding=NONE, residual=True),
    "point norm": Layer(32, 8, kernel=1, padding=NONE, groups=8, silu=True),
    "point wide": Layer(1200, 70, kernel=1, padding=NONE),
    "point strided": Layer(10, 8, kernel=1, stride=2, padding=NONE),
    "point padded": Layer(10, 8, kernel=1, padding=(1, 0, 1, 1)),
    "half": Layer(64, 64, HALF, HALF, groups=16, silu=True, residual=True),
    "half odd": Layer(7, 5, HALF, HALF, groups=1, silu=True),
    "half picture": Layer(3, 80, HALF, HALF),
    "half up": Layer(33, 40, HALF, HALF, upsample=True),
    "half long": Layer(700, 16, HALF, HALF, stride=2, padding=(0, 1, 0, 1)),
    "half point": Layer(24, 100, HALF, HALF, kernel=1, padding=NONE),
    "half point wide": Layer(2300, 20, HALF, HALF, kernel=1, padding=NONE),
    "half point odd": Layer(23, 9, HALF, HALF, kernel=1, padding=NONE),
    "mixed": Layer(32, 32, HALF, FLOAT, groups=4, silu=True, residual=True),
    "mixed plain": Layer(19, 32, HALF, FLOAT),
}
SIZES = [(1, 8, 8), (2, 5, 7), (1, 1, 1), (3, 2, 13), (1, 33, 3), (1, 16, 64)]


def _build(module: Module) -> None:
    cpu = DeviceRef.CPU()
    for name, layer in LAYERS.items():
        packed = processor.packed_filter_shape(
            layer.channels, layer.inputs, layer.kernel, layer.products
        )
        residual = (layer.channels,) if layer.residual else (0,)
        types = [
            TensorType(layer.dtype, ("b", "h", "w", layer.inputs), cpu),
            TensorType(layer.products, packed, cpu),
            TensorType(FLOAT, (layer.channels,), cpu),
            TensorType(FLOAT, (layer.inputs,), cpu),
            TensorType(FLOAT, (layer.inputs,), cpu),
            TensorType(layer.dtype, ("rb", "rh", "rw", *residual), cpu),
        ]
        with Graph(name.replace(" ", "_"), input_types=types, module=module) as graph:
            x, matrix, bias, gamma, beta, added = (v.tensor for v in graph.inputs)
            norm = convolutions.GroupNorm(layer.groups, gamma, beta)
            graph.output(
                convolutions.convolution(
                    x,
                    matrix,
                    layer.channels,
                    bias=bias if layer.bias else None,
                    kernel=layer.kernel,
                    stride=layer.stride,
                    padding=layer.padding,
                    norm=norm if layer.groups else None,
                    silu=layer.silu,
                    upsample=layer.upsample,
                    residual=added if layer.residual else None,
                )
            )


@pytest.fixture(scope="module")
def models() -> Mapping[str, Model]:
    """All layers, compiled."""
    permitted_matrix_unit()  # products of bfloat16 look whether they may use it
    module = GraphModule("convolutions", _build, is_for_cpu=True)
    session = InferenceSession(devices=[CPU()])
    return session.init_all(compiled_module(session, module), weights_registry={})


@dataclass(frozen=True)
class Case:
    """Random inputs of a layer, and what the result should be."""

    inputs: list[torch.Tensor]
    expected: torch.Tensor
    scale: float
    """The result's size, which errors are measured by."""


def case_of(
    layer: Layer,
    size: tuple[int, int, int],
    *,
    offset: float = 0.0,
    change: Callable[[torch.Tensor], None] | None = None,
) -> Case:
    """Makes inputs and computes the result in float64."""
    random = torch.Generator().manual_seed(sum(size) + layer.inputs)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    batch, height, width = size
    dtype = NUMBERS[layer.dtype]
    x = (normal(batch, height, width, layer.inputs) + offset).to(dtype)
    if change:
        change(x)
    filters = normal(layer.channels, layer.inputs, layer.kernel, layer.kernel)
    filters = (filters / filters[0].numel() ** 0.5).to(NUMBERS[layer.products])
    bias, gamma, beta = (
        normal(layer.channels),
        normal(layer.inputs),
        normal(layer.inputs),
    )
    y = x.double().permute(0, 3, 1, 2)
    if layer.groups:
        y = group_norm(y, layer.groups) * gamma[:, None, None] + beta[:, None, None]
    if layer.silu:
        y = functional.silu(y)
    if layer.upsample:
        y = functional.interpolate(y, scale_factor=2, mode="nearest")
    top, bottom, left, right = layer.padding
    y = functional.pad(y, (left, right, top, bottom))
    expected = functional.conv2d(y, filters.double(), stride=layer.stride)
    expected = expected.permute(0, 2, 3, 1)
    if layer.bias:
        expected = expected + bias
    added = torch.zeros(0, 0, 0, 0, dtype=dtype)
    if layer.residual:
        added = normal(*expected.shape).to(dtype)
        expected = expected + added
    inputs = [x, pack(filters), bias, gamma, beta, added]
    size_of_result = float(expected.nan_to_num().square().mean().sqrt())
    return Case(inputs, expected, max(1.0, size_of_result))


def run(model: Model, case: Case) -> torch.Tensor:
    """Runs a model on a case's inputs."""
    result = model.execute(*(Buffer.from_dlpack(each) for each in case.inputs))
    return torch.utils.dlpack.from_dlpack(result[0])


def _limit(layer: Layer) -> float:
    return 3e-2 if HALF in (layer.dtype, layer.products) else 1e-5


def _fits(layer: Layer, size: tuple[int, int, int]) -> bool:
    zoom = 2 if layer.upsample else 1
    top, bottom, left, right = layer.padding
    _, height, width = size
    return (
        min(height * zoom + top + bottom, width * zoom + left + right) >= layer.kernel
    )


CASES = [
    (name, size)
    for name, layer in LAYERS.items()
    for size in SIZES
    if _fits(layer, size)
]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_equals_float64(
    models: Mapping[str, Model], name: str, size: tuple[int, int, int]
) -> None:
    layer = LAYERS[name]
    case = case_of(layer, size)
    y = run(models[name.replace(" ", "_")], case)
    assert y.dtype == NUMBERS[layer.dtype]
    assert y.shape == case.expected.shape
    assert float((y - case.expected).abs().max()) / case.scale < _limit(layer)


@pytest.mark.parametrize(
    ("name", "size"),
    [("plain", (1, 200, 100)), ("plain", (60, 16, 16)), ("up norm", (2, 120, 101))],
)
def test_images_of_several_strips(
    models: Mapping[str, Model], name: str, size: tuple[int, int, int]
) -> None:
    case = case_of(LAYERS[name], size)
    y = run(models[name.replace(" ", "_")], case)
    assert float((y - case.expected).abs().max()) / case.scale < 1e-5


def test_norm_of_numbers_far_from_zero(models: Mapping[str, Model]) -> None:
    case = case_of(LAYERS["norm"], (2, 24, 30), offset=1000.0)
    y = run(models["norm"], case)
    assert float((y - case.expected).abs().max()) / case.scale < 1e-3


@pytest.mark.parametrize("name", ["plain", "norm", "half", "half_odd", "long"])
def test_nan_spreads_as_far_as_it_should(
    models: Mapping[str, Model], name: str
) -> None:
    def put_nan(x: torch.Tensor) -> None:
        x[0, 3, 4, 0] = torch.nan

    case = case_of(LAYERS[name.replace("_", " ")], (2, 9, 9), change=put_nan)
    y = run(models[name], case)
    assert torch.equal(y.isnan(), case.expected.isnan())
    assert y[0].isnan().any()
    assert not y[1].isnan().any()


def test_other_residual_is_an_error(models: Mapping[str, Model]) -> None:
    case = case_of(LAYERS["norm"], (1, 6, 6))
    case.inputs[5] = case.inputs[5][:, :-1].contiguous()
    with pytest.raises(Exception, match=r"residual|shape|dimension"):
        run(models["norm"], case)


def test_image_smaller_than_filter_is_an_error(models: Mapping[str, Model]) -> None:
    case = case_of(LAYERS["no padding"], (1, 3, 3))
    case.inputs[0] = case.inputs[0][:, :2].contiguous()
    with pytest.raises(Exception, match=r"smaller|shape|dimension"):
        run(models["no_padding"], case)


def test_same_result_again(models: Mapping[str, Model]) -> None:
    case = case_of(LAYERS["norm"], (2, 40, 30))
    first = run(models["norm"], case).clone()
    for _ in range(5):
        assert torch.equal(run(models["norm"], case), first)


def test_packing_has_the_shape_of_the_slot() -> None:
    for layer in LAYERS.values():
        filters = torch.zeros(layer.channels, layer.inputs, layer.kernel, layer.kernel)
        shape = processor.packed_filter_shape(
            layer.channels, layer.inputs, layer.kernel, layer.products
        )
        assert pack(filters.to(NUMBERS[layer.products])).shape == shape
    assert processor.packed_filter_shape(3, 3, 3, HALF) == (1, 18, 128)
