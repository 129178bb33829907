"""The operations for CPUs against float64, over shapes with tails and odd numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from kernel_oracle import Array, activation, attention, exact, norm, pack, rounded
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, Module, TensorType

from graphs import processor
from graphs.processor import Columns, Gate, RowNorm, TokenStream
from max_diffusion.core.buffers import bfloat16_bits
from max_diffusion.execution.compiler import compiled_module
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.execution.matrix_unit import permitted_matrix_unit

CPU_REF = DeviceRef.CPU()
F32, BF16 = DType.float32, DType.bfloat16
DTYPES = {"float32": F32, "bfloat16": BF16}
ROWS = (1, 2, 5, 6, 7, 61, 130)
# Sums and features: below, at and above vectors, panels and blocks of a sum.
MATRICES = ((1, 1), (3, 17), (16, 64), (40, 48), (192, 144), (1300, 70), (2311, 65))
HEADS = ((1, 8), (3, 16), (2, 24), (1, 40), (2, 64), (1, 80), (1, 128))
LENGTHS = ((1, 0), (3, 2), (48, 17), (64, 64), (300, 7))


def typed(dtype: DType, *shape: int | str) -> TensorType:
    return TensorType(dtype, shape, CPU_REF)


def settled(value: Array, dtype: DType) -> Buffer | Array:
    """An input of a graph."""
    value = np.ascontiguousarray(value, np.float32)
    if dtype == F32:
        return value
    return Buffer.from_numpy(bfloat16_bits(value)).view(BF16, value.shape)


def numbers(value: Buffer) -> Array:
    """Of a graph's output."""
    if value.dtype == BF16:
        bits = value.view(DType.uint16, value.shape).to_numpy().astype(np.uint32)
        return (bits << 16).view(np.float32).astype(np.float64)
    return value.to_numpy().astype(np.float64)


@pytest.fixture(scope="module")
def models() -> Mapping[str, Model]:
    """Graphs of every kind of operation, compiled once."""

    def build(module: Module) -> None:
        for name, dtype in DTYPES.items():
            for inputs, features in MATRICES:
                _add_linear(module, name, dtype, inputs, features)
            for heads, size in HEADS:
                _add_attention(module, name, dtype, heads, size)
        _add_everything(module, "float32", F32)
        _add_everything(module, "bfloat16", BF16)
        _add_plain_attention(module)
        _add_any_sizes(module)

    permitted_matrix_unit()  # products of bfloat16 look whether they may use it
    module = GraphModule("kernels", build, is_for_cpu=True)
    session = InferenceSession(devices=[CPU()])
    compiled = compiled_module(session, module)
    return session.init_all(compiled, weights_registry={})


def _matrix(dtype: DType, inputs: int, features: int) -> TensorType:
    return typed(dtype, *processor.packed_shape(features, inputs, dtype))


def _add_linear(
    module: Module, name: str, dtype: DType, inputs: int, features: int
) -> None:
    types = [
        typed(dtype, "rows", inputs),
        _matrix(dtype, inputs, features),
        typed(F32, features),
    ]
    name = f"linear_{name}_{inputs}_{features}"
    with Graph(name, input_types=types, module=module) as graph:
        x, matrix, bias = (value.tensor for value in graph.inputs)
        columns = Columns.all_of(x)
        graph.output(processor.linear(columns, matrix, features, bias=bias))


# (batch, 5 rows of each) and what is around the product; see test_all_around_a_product.
INPUTS, BESIDE, FEATURES, FIRST = 37, 22, 83, 11


def _add_everything(module: Module, name: str, dtype: DType) -> None:
    """Every part that a linear layer can have, in float32 lanes and in the dtype's."""
    for lanes in {F32, dtype}:
        features = FEATURES - FIRST
        types = [
            typed(dtype, "batch", 5, INPUTS + 4),
            typed(dtype, "batch", 5, BESIDE + 3),
            _matrix(lanes, INPUTS + BESIDE, FEATURES),
            typed(F32, FEATURES),
            typed(F32, "batch", 2 * INPUTS + features + 9),
            typed(dtype, "batch", 5, features),
        ]
        for kind in ("layer", "rms"):
            for act in ("gelu_tanh", "silu", "quick_gelu", "relu"):
                each = f"all_{name}_{lanes.name}_{kind}_{act}"
                with Graph(each, input_types=types, module=module) as graph:
                    x, beside, matrix, bias, vectors, residual = (
                        value.tensor for value in graph.inputs
                    )
                    y = processor.linear(
                        Columns(x, 3, INPUTS),
                        matrix,
                        features,
                        bias=bias,
                        first=FIRST,
                        beside=Columns(beside, 2, BESIDE),
                        norm=RowNorm(
                            kind,
                            vectors,
                            7,
                            7 + INPUTS if kind == "layer" else None,
                            offset=float(kind == "layer"),
                            epsilon=1e-3,
                        ),
                        activation=act,
                        activated_from=20,
                        gate=Gate(vectors, 8 + 2 * INPUTS, residual),
                    )
                    graph.output(y)


def _add_attention(
    module: Module, name: str, dtype: DType, heads: int, size: int
) -> None:
    width = 3 * heads * size
    types = [
        typed(dtype, "batch", "first", width),
        typed(dtype, "batch", "second", width),
        typed(F32, 2, size),
        typed(F32, 2, size),
        typed(F32, 2, "first", size),
        typed(F32, 2, "second", size),
    ]
    name = f"attention_{name}_{heads}_{size}"
    with Graph(name, input_types=types, module=module) as graph:
        a, b, *rest = (value.tensor for value in graph.inputs)
        streams = [TokenStream(a, rest[0], rest[2]), TokenStream(b, rest[1], rest[3])]
        graph.output(
            *processor.attention(streams, heads, size, scale=size**-0.5, norm="rms")
        )


def _add_plain_attention(module: Module) -> None:
    """One stream: with a bias of each broadcast, and with layer norms."""
    for batch, heads, queries in ((1, 1, 1), (1, 3, "tokens"), ("batch", 1, 1)):
        types = [
            typed(F32, "batch", "tokens", 3 * 3 * 20),
            typed(F32, batch, heads, queries, "tokens"),
        ]
        name = f"bias_{batch}_{heads}_{queries}"
        with Graph(name, input_types=types, module=module) as graph:
            x, bias = (value.tensor for value in graph.inputs)
            y = processor.attention([TokenStream(x)], 3, 20, scale=0.3, bias=bias)
            graph.output(*y)
    types = [typed(F32, "batch", "tokens", 3 * 2 * 24), typed(F32, 4, 24)]
    with Graph("layer_norms", input_types=types, module=module) as graph:
        x, vectors = (value.tensor for value in graph.inputs)
        stream = TokenStream(x, vectors)
        graph.output(*processor.attention([stream], 2, 24, scale=0.2, norm="layer"))
    types = [
        typed(F32, "batch", "tokens", 3 * 32),
        typed(F32, "tables", 2, "tokens", 16),
    ]
    with Graph("own_tables", input_types=types, module=module) as graph:
        x, table = (value.tensor for value in graph.inputs)
        y = processor.attention([TokenStream(x, rotary=table)], 2, 16, scale=0.25)
        graph.output(*y)


def _add_any_sizes(module: Module) -> None:
    """A product whose matrix may be of any shape."""
    types = [
        typed(F32, "rows", 40),
        typed(F32, "panels", "lanes", "width"),
        typed(F32, "bias"),
    ]
    with Graph("any_sizes", input_types=types, module=module) as graph:
        x, matrix, bias = (value.tensor for value in graph.inputs)
        graph.output(processor.linear(Columns.all_of(x), matrix, 48, bias=bias))


def _relative(found: Array, wanted: Array) -> float:
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found - wanted)) / max(size, 1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "features"), MATRICES)
def test_products(
    models: Mapping[str, Model], dtype: str, inputs: int, features: int
) -> None:
    rng = np.random.default_rng()
    kind = DTYPES[dtype]
    matrix = rng.standard_normal((features, inputs)).astype(np.float32)
    bias = rng.standard_normal(features).astype(np.float32)
    packed = pack(matrix, kind)
    for rows in ROWS:
        x = rng.standard_normal((rows, inputs)).astype(np.float32)
        found = models[f"linear_{dtype}_{inputs}_{features}"].execute(
            settled(x, kind), packed, bias
        )[0]
        if kind == BF16:
            wanted = rounded(rounded(x) @ rounded(matrix).T + bias)
            assert _relative(numbers(found), wanted) < 3e-3
        else:
            wanted = x.astype(np.float64) @ matrix.T.astype(np.float64) + bias
            # Sums in order: their error grows as a random walk of roundings.
            limit = 2**-24 * max(8.0, inputs**0.5)
            assert _relative(numbers(found), wanted) < limit


@pytest.mark.parametrize("act", ["gelu_tanh", "silu", "quick_gelu", "relu"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(
    ("dtype", "lanes"),
    [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")],
)
def test_all_around_a_product(
    models: Mapping[str, Model], dtype: str, lanes: str, kind: str, act: str
) -> None:
    rng = np.random.default_rng()

    def drawn(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    held = rounded if dtype == "bfloat16" else exact
    features = FEATURES - FIRST
    for batch in (1, 3):
        x, beside = drawn(batch, 5, INPUTS + 4), drawn(batch, 5, BESIDE + 3)
        matrix, bias = drawn(FEATURES, INPUTS + BESIDE), drawn(FEATURES)
        vectors = drawn(batch, 2 * INPUTS + features + 9)
        residual = drawn(batch, 5, features)
        found = models[f"all_{dtype}_{lanes}_{kind}_{act}"].execute(
            settled(x, DTYPES[dtype]),
            settled(beside, DTYPES[dtype]),
            pack(matrix, DTYPES[lanes]),
            bias,
            vectors,
            settled(residual, DTYPES[dtype]),
        )[0]
        table = vectors.astype(np.float64)[:, None]
        y = norm(kind, held(x[..., 3 : 3 + INPUTS]), 1e-3)
        scale = table[..., 7 : 7 + INPUTS]
        y = y * (1 + scale) if kind == "layer" else y * scale
        if kind == "layer":
            y = y + table[..., 7 + INPUTS : 7 + 2 * INPUTS]
        y = np.concatenate([y, held(beside[..., 2 : 2 + BESIDE])], -1)
        used = rounded(matrix) if lanes == "bfloat16" else matrix.astype(np.float64)
        y = (rounded(y) if lanes == "bfloat16" else y) @ used.T + bias
        y = y[..., FIRST:]
        y = np.concatenate([y[..., :20], activation(act, y[..., 20:])], -1)
        gate = table[..., 8 + 2 * INPUTS : 8 + 2 * INPUTS + features]
        wanted = held(residual) + gate * y
        limit = 1e-6 if dtype == "float32" else 4e-3
        assert _relative(numbers(found), wanted) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), HEADS)
def test_joint_attention(
    models: Mapping[str, Model], dtype: str, heads: int, size: int
) -> None:
    rng = np.random.default_rng()
    kind = DTYPES[dtype]
    held = rounded if kind == BF16 else exact
    for lengths in LENGTHS:
        for batch in (1, 2):
            tokens = [
                rng.standard_normal((batch, each, 3 * heads * size), np.float32)
                for each in lengths
            ]
            norms = [rng.standard_normal((2, size), np.float32) for _ in lengths]
            angles = [
                np.repeat(rng.uniform(-4, 4, (each, size // 2)), 2, 1)
                for each in lengths
            ]
            tables = [
                np.stack([np.cos(each), np.sin(each)]).astype(np.float32)
                for each in angles
            ]
            found = models[f"attention_{dtype}_{heads}_{size}"].execute(
                *(settled(each, kind) for each in tokens), *norms, *tables
            )
            wanted = attention(
                [held(each) for each in tokens],
                heads,
                size,
                size**-0.5,
                "rms",
                norms,
                tables,
            )
            joined = np.concatenate([numbers(each) for each in found], 1)
            assert _relative(joined, wanted) < (2e-2 if kind == BF16 else 2e-6)


def test_attention_with_a_bias_and_with_layer_norms(
    models: Mapping[str, Model],
) -> None:
    rng = np.random.default_rng()
    for length in (1, 70, 259):
        x = rng.standard_normal((2, length, 3 * 3 * 20), np.float32)
        for shape, name in (
            ((1, 1, 1, length), "bias_1_1_1"),
            ((1, 3, length, length), "bias_1_3_tokens"),
            ((2, 1, 1, length), "bias_batch_1_1"),
        ):
            bias = rng.standard_normal(shape, np.float32)
            bias[..., rng.random(length) < 0.3] = -1e30
            bias[..., 0] = 0
            (found,) = models[name].execute(x, bias)
            wanted = attention([x], 3, 20, 0.3, bias=bias)
            assert _relative(numbers(found), wanted) < 2e-6
        x = rng.standard_normal((2, length, 3 * 2 * 24), np.float32)
        vectors = rng.standard_normal((4, 24), np.float32)
        (found,) = models["layer_norms"].execute(x, vectors)
        wanted = attention([x], 2, 24, 0.2, "layer", [vectors])
        assert _relative(numbers(found), wanted) < 2e-6


def test_keys_that_a_bias_rules_out(models: Mapping[str, Model]) -> None:
    rng = np.random.default_rng()
    x = rng.standard_normal((2, 300, 3 * 3 * 20), np.float32)
    bias = np.zeros((2, 1, 1, 300), np.float32)
    bias[0, ..., :270] = -1e30  # all of the first keys that are looked at together
    bias[1, ..., 5:] = -np.inf
    (found,) = models["bias_batch_1_1"].execute(x, bias)
    wanted = attention([x], 3, 20, 0.3, bias=bias)
    assert _relative(numbers(found), wanted) < 2e-6


def test_positions_of_each_sample(models: Mapping[str, Model]) -> None:
    rng = np.random.default_rng()
    for batch, length in ((1, 5), (3, 130), (2, 300)):
        x = rng.standard_normal((batch, length, 3 * 32), np.float32)
        angles = np.repeat(rng.uniform(-4, 4, (batch, length, 8)), 2, 2)
        tables = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        (found,) = models["own_tables"].execute(x, tables)
        for sample in range(batch):
            own = x[sample : sample + 1]
            wanted = attention([own], 2, 16, 0.25, tables=[tables[sample]])
            assert _relative(numbers(found)[sample], wanted[0]) < 2e-6
    with pytest.raises(Exception, match="rotary table's shape"):
        models["own_tables"].execute(x, np.concatenate([tables, tables[:1]]))


def test_samples_do_not_influence_each_other(models: Mapping[str, Model]) -> None:
    rng = np.random.default_rng()
    model = models["attention_float32_3_16"]
    norms = [rng.standard_normal((2, 16), np.float32) for _ in range(2)]
    tables = [rng.standard_normal((2, each, 16), np.float32) for each in (70, 9)]
    tokens = [rng.standard_normal((3, each, 3 * 48), np.float32) for each in (70, 9)]
    together = model.execute(*tokens, *norms, *tables)
    for sample in range(3):
        own = [np.ascontiguousarray(each[sample : sample + 1]) for each in tokens]
        alone = model.execute(*own, *norms, *tables)
        for whole, one in zip(together, alone, strict=True):
            assert np.array_equal(whole.to_numpy()[sample], one.to_numpy()[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_so(
    models: Mapping[str, Model], bad: float, dtype: str
) -> None:
    rng = np.random.default_rng()
    kind = DTYPES[dtype]
    matrix = rng.standard_normal((144, 192)).astype(np.float32)
    x = rng.standard_normal((40, 192)).astype(np.float32)
    x[4, 100] = bad
    found = numbers(
        models[f"linear_{dtype}_192_144"].execute(
            settled(x, kind), pack(matrix, kind), np.zeros(144, np.float32)
        )[0]
    )
    assert not np.isfinite(found[4]).any()
    assert np.isfinite(np.delete(found, 4, 0)).all()
    norms = [np.ones((2, 16), np.float32)] * 2
    tables = [np.ones((2, each, 16), np.float32) for each in (48, 17)]
    tokens = [np.ones((2, each, 144), np.float32) for each in (48, 17)]
    tokens[0][1, 3, 48 + 20] = bad  # a key of the second head
    both = models[f"attention_{dtype}_3_16"].execute(
        *(settled(each, kind) for each in tokens), *norms, *tables
    )
    for each in map(numbers, both):
        assert np.isnan(each[1, :, 16:32]).all()
        assert np.isfinite(each[0]).all()
        assert np.isfinite(each[1, :, :16]).all()


def test_a_matrix_unit_multiplies_where_there_is_one(
    models: Mapping[str, Model],
) -> None:
    """It sums the first of all pairs and the second of all by themselves, where all
    else goes from pair to pair and loses the 1 beside a large number."""
    x = np.zeros((40, 192), np.float32)
    x[:, :4] = 2**30, 1, -(2**30), 0
    matrix = np.ones((144, 192), np.float32)
    inputs = settled(x, BF16), pack(matrix, BF16), np.zeros(144, np.float32)
    found = numbers(models["linear_bfloat16_192_144"].execute(*inputs)[0])
    assert np.all((found == 1) == permitted_matrix_unit())


def test_tiny_and_huge_numbers(models: Mapping[str, Model]) -> None:
    model = models["linear_float32_192_144"]
    bias = np.zeros(144, np.float32)
    for size in (1e-41, 1e-30, 1e30):
        x = np.full((6, 192), size, np.float32)
        matrix = np.full((144, 192), 1e-3 if size > 1 else 1e3, np.float32)
        found = model.execute(x, pack(matrix, F32), bias)[0].to_numpy()
        wanted = x.astype(np.float64) @ matrix.T.astype(np.float64)
        # Denormals may be taken as zero, and no worse.
        assert np.allclose(found, wanted, rtol=192 * 2**-24, atol=2e-36)


@pytest.mark.parametrize(
    ("panels", "lanes", "width", "bias", "told"),
    [
        (1, 40, 64, 48, ""),
        (1, 39, 64, 48, "other inputs"),
        (0, 40, 64, 48, "fewer columns"),
        (1, 40, 63, 48, "not packed"),
        (1, 40, 64, 47, "bias is shorter"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(
    models: Mapping[str, Model],
    panels: int,
    lanes: int,
    width: int,
    bias: int,
    told: str,
) -> None:
    inputs = (
        np.ones((3, 40), np.float32),
        np.ones((panels, lanes, width), np.float32),
        np.ones(bias, np.float32),
    )
    if not told:
        assert (models["any_sizes"].execute(*inputs)[0].to_numpy() == 41).all()
        return
    with pytest.raises(Exception, match=told):
        models["any_sizes"].execute(*inputs)
