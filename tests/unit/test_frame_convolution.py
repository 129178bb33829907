"""Convolutions over time for CPUs against float64, over odd sizes; one compile."""

from __future__ import annotations

from collections.abc import Mapping
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
    """What a graph computes, whatever the video's size."""

    inputs: int
    channels: int
    dtype: DType = FLOAT
    products: DType = FLOAT
    groups: int = 0
    is_scaled: bool = False
    silu: bool = False
    residual: bool = False


LAYERS = {
    "plain": Layer(8, 48),
    "whole": Layer(64, 64, groups=32, residual=True, is_scaled=True, silu=True),
    "unscaled": Layer(12, 20, groups=4, silu=True),
    "linear": Layer(6, 33, groups=3, is_scaled=True, residual=True),
    "narrow": Layer(32, 16, groups=4, residual=True, is_scaled=True, silu=True),
    "two": Layer(32, 32, groups=4, is_scaled=True, silu=True),
    "odd": Layer(7, 3, groups=7, is_scaled=True, silu=True),
    "one": Layer(1, 1),
    "long": Layer(150, 130, groups=10, residual=True, is_scaled=True, silu=True),
    "longest": Layer(400, 17, groups=4, is_scaled=True, silu=True),
    "half": Layer(
        48, 48, HALF, HALF, groups=4, residual=True, is_scaled=True, silu=True
    ),
    "half plain": Layer(9, 70, HALF, HALF),
    "half narrow": Layer(
        16, 16, HALF, HALF, groups=4, residual=True, is_scaled=True, silu=True
    ),
    "half odd": Layer(7, 3, HALF, HALF, groups=7, is_scaled=True, silu=True),
    "half long": Layer(
        360, 66, HALF, HALF, groups=5, residual=True, is_scaled=True, silu=True
    ),
    "mixed": Layer(
        24, 24, HALF, FLOAT, groups=4, residual=True, is_scaled=True, silu=True
    ),
}
# Frames, height and width of what scales, and how often each of its pixels is repeated.
SIZES = [
    (1, 1, 1, 1),
    (3, 2, 3, 4),
    (2, 5, 7, 1),
    (4, 4, 1, 2),
    (1, 3, 13, 2),
    (9, 2, 8, 8),
]


def _build(module: Module) -> None:
    cpu = DeviceRef.CPU()
    for name, layer in LAYERS.items():
        packed = processor.packed_filter_shape(
            layer.channels, layer.inputs, 3, layer.products
        )
        residual = (layer.channels,) if layer.residual else (0,)
        types = [
            TensorType(layer.dtype, ("f", "h", "w", layer.inputs), cpu),
            TensorType(layer.dtype, ("bf", "bh", "bw", layer.inputs), cpu),
            TensorType(DType.int64, ("first",), cpu),
            TensorType(DType.int64, ("last",), cpu),
            *(TensorType(layer.products, packed, cpu) for _ in range(3)),
            TensorType(FLOAT, (layer.channels,), cpu),
            TensorType(FLOAT, (layer.inputs,), cpu),
            TensorType(FLOAT, (layer.inputs,), cpu),
            TensorType(FLOAT, ("sf", "sh", "sw", 2 * layer.inputs + 1), cpu),
            TensorType(layer.dtype, ("rf", "rh", "rw", *residual), cpu),
        ]
        with Graph(name.replace(" ", "_"), input_types=types, module=module) as graph:
            x, before, first, last, *filters = (v.tensor for v in graph.inputs[:7])
            bias, gamma, beta, given, added = (v.tensor for v in graph.inputs[7:])
            y, kept = convolutions.frame_convolution(
                x,
                convolutions.FramesBefore(before, first, last),
                filters,
                layer.channels,
                bias=bias,
                norm=convolutions.GroupNorm(layer.groups, gamma, beta)
                if layer.groups
                else None,
                # Shifts first, and a column that is neither's between.
                modulation=convolutions.Modulation(
                    processor.Columns(given, layer.inputs + 1, layer.inputs),
                    processor.Columns(given, 0, layer.inputs),
                )
                if layer.is_scaled
                else None,
                silu=layer.silu,
                residual=added if layer.residual else None,
            )
            graph.output(y, kept)


@pytest.fixture(scope="module")
def models() -> Mapping[str, Model]:
    """All layers, compiled."""
    permitted_matrix_unit()  # products of bfloat16 look whether they may use it
    module = GraphModule("frame_convolutions", _build, is_for_cpu=True)
    session = InferenceSession(devices=[CPU()])
    return session.init_all(compiled_module(session, module), weights_registry={})


@dataclass(frozen=True)
class Case:
    """Random inputs of a layer, and what the results should be."""

    inputs: list[torch.Tensor]
    expected: torch.Tensor
    kept: torch.Tensor


def case_of(
    layer: Layer,
    size: tuple[int, int, int, int],
    *,
    is_first: bool = False,
    has_nan: bool = False,
) -> Case:
    """Makes inputs and computes the results in float64."""
    random = torch.Generator().manual_seed(sum(size) + layer.inputs)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    frames, rows, columns, zoom = size
    channels, dtype = layer.inputs, NUMBERS[layer.dtype]
    shape = rows * zoom, columns * zoom, channels
    x, before = normal(frames, *shape).to(dtype), normal(2, *shape).to(dtype)
    if has_nan:
        before[1, 1, 0, 0] = torch.nan
    given = normal(frames, rows, columns, 2 * channels + 1)
    filters = normal(3, layer.channels, channels, 3, 3) / (27 * channels) ** 0.5
    filters = filters.to(NUMBERS[layer.products])
    bias, gamma, beta = normal(layer.channels), normal(channels), normal(channels)

    own = x.double()
    if layer.groups:
        flat = own.permute(3, 0, 1, 2)[None]
        normed = group_norm(flat, layer.groups)[0].permute(1, 2, 3, 0)
        own = normed * gamma + beta
    if layer.is_scaled:
        spread = given.double().repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        own = own * spread[..., channels + 1 :] + spread[..., :channels]
    if layer.silu:
        own = functional.silu(own)
    front = [2, 2] if is_first else [0, 1]
    index = torch.tensor([*front, *range(2, 2 + frames)])
    seen = torch.cat([before.double(), own])[index]
    expected = torch.zeros(frames, *shape[:2], layer.channels, dtype=torch.float64)
    for frame in range(3):
        under = seen[frame : frame + frames].permute(0, 3, 1, 2)
        y = functional.conv2d(under, filters[frame].double(), padding=1)
        expected += y.permute(0, 2, 3, 1)
    expected += bias
    added = torch.zeros(0, 0, 0, 0, dtype=dtype)
    if layer.residual:
        added = normal(*expected.shape).to(dtype)
        expected += added
    packed = [pack(each) for each in filters]
    inputs = [x, before, index[:frames].clone(), index[frames:].clone(), *packed]
    inputs += [bias, gamma, beta, given, added]
    return Case(inputs, expected, seen[frames:])


def run(model: Model, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a model on a case's inputs."""
    y, kept = model.execute(*(Buffer.from_dlpack(each) for each in case.inputs))
    return torch.utils.dlpack.from_dlpack(y), torch.utils.dlpack.from_dlpack(kept)


def check(layer: Layer, case: Case, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compares results; float32 sums have up to 10,800 products."""
    is_half = layer.dtype == HALF
    assert error(found[0], case.expected) < (3e-2 if is_half else 2e-5)
    # What is kept is rounded once.
    allowed = (2**-8 if is_half else 0) * case.kept.abs() + 1e-5
    assert bool(((found[1] - case.kept).abs() <= allowed).all())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to what is expected."""
    scale = max(1.0, float(expected.square().mean().sqrt()))
    return float((found - expected).abs().max()) / scale


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_float64(
    models: Mapping[str, Model],
    name: str,
    size: tuple[int, int, int, int],
    is_first: bool,
) -> None:
    layer = LAYERS[name]
    case = case_of(layer, size, is_first=is_first)
    y, kept = found = run(models[name.replace(" ", "_")], case)
    assert y.dtype == kept.dtype == NUMBERS[layer.dtype]
    assert (y.shape, kept.shape) == (case.expected.shape, case.kept.shape)
    check(layer, case, found)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("whole", (5, 16, 20, 4)),
        ("narrow", (3, 50, 15, 8)),
        ("half", (17, 10, 13, 8)),
    ],
)
def test_videos_of_several_strips(
    models: Mapping[str, Model], name: str, size: tuple[int, int, int, int]
) -> None:
    layer = LAYERS[name]
    case = case_of(layer, size)
    check(layer, case, run(models[name], case))


def test_a_part_goes_on_where_the_one_before_ended(
    models: Mapping[str, Model],
) -> None:
    """Frames in two parts are what they are in one, as there is no norm."""
    whole = case_of(LAYERS["plain"], (7, 3, 4, 2), is_first=True)
    expected, _ = run(models["plain"], whole)
    x = whole.inputs[0]
    first = list(whole.inputs)
    first[0], first[2] = x[:4].contiguous(), whole.inputs[2][:4].clone()
    first[3] = torch.tensor([4, 5])
    y, kept = run(models["plain"], Case(first, whole.expected, whole.kept))
    assert torch.equal(y, expected[:4])
    second = list(whole.inputs)
    second[0], second[1] = x[4:].contiguous(), kept.clone()
    second[2], second[3] = torch.tensor([0, 1, 2]), torch.tensor([3, 4])
    y, kept = run(models["plain"], Case(second, whole.expected, whole.kept))
    assert torch.equal(y, expected[4:])
    assert torch.equal(kept, x[5:])


@pytest.mark.parametrize("name", ["plain", "whole", "half", "half_plain"])
def test_nan_spreads_as_far_as_it_should(
    models: Mapping[str, Model], name: str
) -> None:
    case = case_of(LAYERS[name.replace("_", " ")], (4, 5, 6, 1), has_nan=True)
    y, kept = run(models[name], case)
    assert torch.equal(y.isnan(), case.expected.isnan())
    assert [bool(frame.isnan().any()) for frame in y] == [True, True, False, False]
    assert not kept.isnan().any()


def test_same_result_again(models: Mapping[str, Model]) -> None:
    case = case_of(LAYERS["whole"], (5, 9, 10, 2))
    first = [each.clone() for each in run(models["whole"], case)]
    for _ in range(5):
        again = run(models["whole"], case)
        assert all(map(torch.equal, again, first))


@pytest.mark.parametrize(
    ("which", "other", "message"),
    [
        (1, torch.zeros(2, 6, 7, 64), "frames before are not like x"),
        (1, torch.zeros(1, 6, 8, 64), r"frames (before )?are not like x"),
        (2, torch.tensor([0, 1, 5]), "no such frame"),
        (2, torch.tensor([0, -1, 2]), "no such frame"),
        (2, torch.tensor([0, 1]), "not an index for every frame"),
        (3, torch.tensor([3, 5]), "no such frame"),
        (3, torch.tensor([3]), "not an index for every frame"),
        (10, torch.zeros(2, 3, 4, 129), "scales of other frames"),
        (10, torch.zeros(3, 4, 4, 129), "scales of another size"),
        (10, torch.zeros(3, 6, 4, 129), "scales of another size"),
        (11, torch.zeros(3, 6, 7, 64), r"residual|dimension"),
    ],
)
def test_what_does_not_fit_is_an_error(
    models: Mapping[str, Model], which: int, other: torch.Tensor, message: str
) -> None:
    case = case_of(LAYERS["whole"], (3, 3, 4, 2))
    case.inputs[which] = other
    with pytest.raises(Exception, match=message):
        run(models["whole"], case)
