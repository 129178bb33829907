"""Weights that files store otherwise than graphs ask for them."""

from __future__ import annotations

import pickle
import tracemalloc
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lora_files
import numpy as np
import pytest
import torch
from max.driver import Buffer
from max.dtype import DType
from safetensors.torch import save_file

from graphs.weights import WeightSlot, WeightSpec
from max_diffusion import ModelLoadError
from max_diffusion.checkpoint import (
    AbstractStoredTensor,
    AbstractTensor,
    ComponentWeights,
    joined,
)
from max_diffusion.checkpoint.computed import adapted, scaled, to_float32
from max_diffusion.checkpoint.tensors import NonFiniteTensor, part_of_whole
from max_diffusion.core.buffers import to_numpy

F32, BF16 = DType.float32, DType.bfloat16
FLOAT8 = {
    torch.float8_e4m3fn: DType.float8_e4m3fn,
    torch.float8_e5m2: DType.float8_e5m2,
}


@dataclass(frozen=True, eq=False)
class Held(AbstractStoredTensor):
    """A tensor in memory that tells when it is read."""

    array: np.ndarray
    reads: list[str]

    def read(self) -> np.ndarray:
        self.reads.append(self.name)
        return self.array


def held(
    arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, DType] | None = None
) -> tuple[ComponentWeights, list[str]]:
    """Weights of arrays, and the names that were read so far."""
    reads: list[str] = []
    tensors = {
        name: Held(
            array.shape,
            (dtypes or {}).get(name, DType.from_numpy(array.dtype)),
            name,
            Path("model/held.safetensors"),
            array.nbytes,
            str(array.dtype),
            array,
            reads,
        )
        for name, array in arrays.items()
    }
    return ComponentWeights("t", tensors), reads


def saved(path: Path, tensors: Mapping[str, torch.Tensor]) -> ComponentWeights:
    save_file(dict(tensors), path)
    return ComponentWeights.from_files("t", [path])


def values(array: np.ndarray | Buffer) -> np.ndarray:
    return to_numpy(array) if isinstance(array, Buffer) else array


def loaded(
    weights: ComponentWeights, dtype: DType = F32, /, **shapes: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """What weights give by names, in which a double underline is a dot."""
    slots = {n.replace("__", "."): shape for n, shape in shapes.items()}
    specs = {name: WeightSpec(shape, dtype) for name, shape in slots.items()}
    assert weights.problems(specs) == []
    filled = weights.load(
        {name: WeightSlot(name, shape, dtype) for name, shape in slots.items()}
    )
    return {name: values(array) for name, array in filled.items()}


def problems(
    weights: ComponentWeights,
    ignore: tuple[str, ...] = (),
    /,
    **shapes: tuple[int, ...],
) -> list[str]:
    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    specs = {name: WeightSpec(shape, F32) for name, shape in names.items()}
    return weights.problems(specs, ignore)


def owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def fused(weights: ComponentWeights, name: str) -> AbstractTensor:
    """Query, key and value of one matrix and one bias."""
    stem, _, kind = name.rpartition(".")
    if stem in ("q", "k", "v"):
        return weights[f"qkv.{kind}"].split(1, 1, 1)["qkv".index(stem)]
    return weights[name]


def test_rows_of_a_fused_matrix_are_mapped(tmp_path: Path) -> None:
    matrix, bias = torch.randn(21, 1 << 14), torch.randn(21)
    weights = saved(tmp_path / "w", {"qkv.weight": matrix, "qkv.bias": bias})
    shapes = {f"{n}__weight": (7, 1 << 14) for n in "qkv"} | {
        f"{n}__bias": (7,) for n in "qkv"
    }
    arrays = loaded(weights.through(fused), **shapes)
    for index, name in enumerate("qkv"):
        rows = slice(7 * index, 7 * index + 7)
        assert np.array_equal(arrays[f"{name}.weight"], matrix[rows].numpy())
        assert np.array_equal(arrays[f"{name}.bias"], bias[rows].numpy())
    for name, array in arrays.items():
        assert owner(array).flags.owndata == name.endswith(".bias"), name
        assert array.flags.aligned
        assert not array.flags.writeable


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shares", [(1, 1), (4, 1, 1), (1, 0, 5), (6,)])
def test_split_and_joined_undo_each_other(
    rng: np.random.Generator, axis: int, shares: tuple[int, ...]
) -> None:
    array = random(rng, 6, 12, 18)
    weights, reads = held({"w": array})
    parts = weights["w"].split(*shares, axis=axis)
    unit = array.shape[axis] // sum(shares)
    theirs = torch.from_numpy(array).split([unit * n for n in shares], axis)
    whole = joined(parts, axis)
    assert reads == []
    for ours, other in zip(parts, theirs, strict=True):
        assert ours.shape == tuple(other.shape)
        assert np.array_equal(ours.read(), other.numpy())
    assert whole.shape == array.shape
    assert np.array_equal(whole.read(), array)
    assert {item.name for item in whole.stored} == {"w"}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_transposed_and_reshaped_as_torch_does(
    tmp_path: Path, stored: torch.dtype, dtype: DType
) -> None:
    matrix = torch.randn(7, 3).to(stored)
    kernel = torch.randn(2, 3, 5, 1).to(stored)
    weights = saved(tmp_path / "w", {"m": matrix, "k": kernel})

    def recipe(source: ComponentWeights, name: str) -> AbstractTensor:
        if name == "m":
            return source["m"].transposed()
        return source["k"].transposed(2, 3, 1, 0).reshaped(15, 2)

    arrays = loaded(weights.through(recipe), dtype, m=(3, 7), k=(15, 2))
    target = {F32: torch.float32, BF16: torch.bfloat16}[dtype]
    for name, theirs in (
        ("m", matrix.T),
        ("k", kernel.permute(2, 3, 1, 0).reshape(15, 2)),
    ):
        assert np.array_equal(arrays[name], theirs.to(target).float().numpy())
        assert arrays[name].flags.c_contiguous


def test_names_are_found_under_others(rng: np.random.Generator) -> None:
    arrays = {name: random(rng, 3) for name in ("net.old.a", "net.b", "other.b")}
    weights, _ = held(arrays)
    under = weights.under("net.").renamed({"new.a": "old.a"})
    found = loaded(under, new__a=(3,), b=(3,))
    assert np.array_equal(found["new.a"], arrays["net.old.a"])
    assert np.array_equal(found["b"], arrays["net.b"])
    by_rule = weights.renamed(lambda name: f"net.{name.replace('new', 'old')}")
    assert np.array_equal(by_rule["new.a"].read(), arrays["net.old.a"])
    assert "new.a" in under
    assert "other.b" not in under
    assert under.get("c") is None


def test_what_is_missing_unused_or_unfit_is_told_by_the_files_names(
    rng: np.random.Generator,
) -> None:
    arrays = {
        "net.qkv.weight": random(rng, 20, 4),
        "net.qkv.bias": random(rng, 21),
        "net.w": random(rng, 3, 2),
        "net.encoder.x": random(rng, 1),
        "net.extra": random(rng, 1),
        "net.first": random(rng, 1),
    }
    weights, reads = held(arrays, {"net.first": DType.int64})

    def recipe(source: ComponentWeights, name: str) -> AbstractTensor:
        if name == "pair":
            return joined(source.all("first", "second", "third"))
        return source["w"].transposed() if name == "turned" else fused(source, name)

    text = "; ".join(
        problems(
            weights.under("net.").through(recipe),
            ("encoder.*",),
            q__weight=(7, 4),
            q__bias=(9,),
            turned=(3, 2),
            pair=(3,),
            out=(2,),
        )
    )
    assert text == (
        "t: 2 weights missing: pair (net.second, net.third in the files), "
        "out (net.out in the files); "
        "t: 1 weights unused: net.extra; "
        "t: 3 weights of the wrong shape: "
        "q.weight (net.qkv.weight (20, 4) cannot be split 1:1:1 along axis 0), "
        "q.bias (expected (9,), got (7,) from net.qkv.bias (21,)), "
        "turned (expected (3, 2), got (2, 3) from net.w (3, 2))"
    )
    assert reads == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: w["a"].sliced(0, 1, 5), "has no elements 1 to 4 along axis 0"),
        (lambda w: w["a"].sliced(2, 0, 1), "has no elements 0 to 0 along axis 2"),
        (lambda w: w["a"].split(1, 1, axis=3), "cannot be split 1:1 along axis 3"),
        (lambda w: w["a"].transposed(0, 2), r"has no axes \(0, 2\) to transpose"),
        (lambda w: w["a"].reshaped(5), r"cannot be reshaped to \(5,\)"),
        (lambda w: joined([w["a"], w["b"]]), r"and b \(5,\) cannot be joined along"),
        (lambda w: joined([w["a"]], 2), "cannot be joined along axis 2"),
        (lambda w: scaled(w["a"], w["b"]), "cannot be multiplied as values and scale"),
        (lambda w: scaled(w["a"], w["a"], (2, 2)), "cannot be multiplied as values"),
        (lambda w: scaled(w["a"], w["s"], (2,)), "cannot be multiplied as values"),
        (lambda w: adapted(w["a"], w["a"], w["b"]), "do not fit as weight, down, up"),
        (lambda w: adapted(w["b"], w["b"], w["b"]), "do not fit as weight, down, up"),
        (lambda w: adapted(w["a"], w["s"], w["a"]), "do not fit as weight, down, up"),
    ],
)
def test_shapes_that_do_not_allow_it_are_one_line_errors(
    rng: np.random.Generator, make: object, message: str
) -> None:
    weights, reads = held(
        {"a": random(rng, 4, 3), "b": random(rng, 5), "s": random(rng)}
    )
    with pytest.raises(ModelLoadError, match=message) as caught:
        make(weights)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert reads == []


@pytest.mark.parametrize("kind", FLOAT8)
def test_every_float8_is_the_number_that_torch_says(kind: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    ours = to_float32(every.numpy(), FLOAT8[kind])
    assert np.array_equal(ours, every.view(kind).float().numpy(), equal_nan=True)


SCALES = [
    ((), None),
    ((1,), None),
    ((6,), None),
    ((6, 1), None),
    ((1, 10), None),
    ((3, 2), None),
    ((2, 3), (4, 4)),  # the last block of both axes is a smaller one
    ((6, 10), (1, 1)),
]


@pytest.mark.parametrize(("shape", "block"), SCALES)
@pytest.mark.parametrize("kind", [*FLOAT8, torch.int8, torch.bfloat16, torch.float32])
def test_scaled_values_and_their_parts(
    rng: np.random.Generator,
    tmp_path: Path,
    kind: torch.dtype,
    shape: tuple[int, ...],
    block: tuple[int, ...] | None,
) -> None:
    stored = torch.from_numpy(10 * random(rng, 6, 10)).to(kind)
    scale = torch.from_numpy(random(rng, *shape))
    weights = saved(tmp_path / "w", {"w": stored, "s": scale})
    tensor = scaled(weights["w"], weights["s"], block)
    spread = scale.double().reshape(shape if len(shape) == 2 else (-1, 1))
    for axis, size in enumerate((6, 10)):
        width = block[axis] if block else size // spread.shape[axis]
        spread = spread.repeat_interleave(width, axis).narrow(axis, 0, size)
    exact = (stored.double() * spread).numpy()
    assert tensor.dtype == F32
    assert np.allclose(tensor.read(), exact, rtol=2**-23, atol=0)
    whole = tensor.read()
    for axis, size in enumerate((6, 10)):
        for start in range(size + 1):
            for stop in range(start, size + 1):
                part = tensor.sliced(axis, start, stop)
                assert np.array_equal(part.read(), whole.take(range(start, stop), axis))
    twice = tensor.sliced(0, 1, 6).sliced(1, 2, 9).sliced(0, 1, 3)
    assert np.array_equal(twice.read(), whole[2:4, 2:9])


@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_files_equal_torch(
    tmp_path: Path, kind: torch.dtype, dtype: torch.dtype
) -> None:
    tensors = {
        "net.a.weight": torch.randn(9, 5).to(kind),
        "net.a.scale_weight": torch.rand(()) + 0.5,
        "net.a.scale_input": torch.ones(()),
        "net.a.bias": torch.randn(9).bfloat16(),
        "net.b.weight": torch.randn(3, 7).to(kind),
        "scaled_fp8": torch.zeros(2).to(kind),
        "net.scaled_fp8": torch.zeros(2).to(kind),
    }
    weights = saved(tmp_path / "w", tensors).under("net.")

    def scale_name(name: str) -> str:
        return name.replace("weight", "scale_weight")

    whole = weights.without("*.scale_input", "scaled_fp8").dequantised(scale_name)
    shapes = {"a__weight": (9, 5), "a__bias": (9,), "b__weight": (3, 7)}
    ours = loaded(whole, {torch.float32: F32, torch.bfloat16: BF16}[dtype], **shapes)
    scale = tensors["net.a.scale_weight"]
    for name, theirs in (
        ("a.weight", tensors["net.a.weight"].float() * scale),
        ("a.bias", tensors["net.a.bias"]),
        ("b.weight", tensors["net.b.weight"]),
    ):
        assert np.array_equal(ours[name], theirs.to(dtype).float().numpy())
    assert problems(weights.dequantised(scale_name), **shapes) == [
        "t: 2 weights unused: net.a.scale_input, net.scaled_fp8"
    ]
    assert "net.a.scale_weight" in problems(weights, **shapes)[0]
    stored = "F8_E4M3" if kind == torch.float8_e4m3fn else "F8_E5M2"
    assert weights.tensors["a.weight"].code == stored
    assert f"a.weight (float8_{stored[3:].lower()}" in problems(weights, **shapes)[1]


def test_scales_that_make_infinity_are_refused(rng: np.random.Generator) -> None:
    arrays = {"w": random(rng, 3, 2), "w.scale": np.array(np.inf, np.float32)}
    weights = held(arrays)[0].dequantised("{}.scale".format)
    slots = {"w": WeightSlot("w", (3, 2), F32)}
    message = r"t: 1 weights hold NaN or infinity: w \(from w \(3, 2\) and w.scale \(\)"
    with pytest.raises(ModelLoadError, match=message):
        weights.load(slots)


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        (1e300, torch.float64, F32),
        (-1e39, torch.float64, BF16),
        (3.4e38, torch.float32, BF16),
        (7e4, torch.float32, DType.float16),
        (7e4, torch.bfloat16, DType.float16),
    ],
)
def test_numbers_beyond_the_dtype_are_refused(
    tmp_path: Path, value: float, kind: torch.dtype, wanted: DType
) -> None:
    path = tmp_path / "my" / "w.safetensors"
    whole = torch.zeros(3, 4, dtype=kind)
    whole[2, 1] = value
    lora_files.write(path, {"good": torch.ones(2, 2), "w": whole})
    weights = ComponentWeights.from_files("t", [path])
    slots = {n: WeightSlot(n, tuple(weights[n].shape), wanted) for n in ("good", "w")}
    with warnings.catch_warnings(), pytest.raises(ModelLoadError) as caught:
        warnings.simplefilter("error")
        weights.load(slots)
    assert str(caught.value) == (
        f"t: 1 weights hold numbers beyond {wanted.name}: w; my/w.safetensors is "
        "damaged, or for a wider dtype"
    )


def test_adapters_whose_product_is_not_finite_are_told_by_their_file(
    tmp_path: Path,
) -> None:
    def halves(name: str, size: float) -> ComponentWeights:
        tensors = {
            "x.lora_A.weight": torch.full((2, 5), size),
            "x.lora_B.weight": torch.full((3, 2), size),
        }
        path = lora_files.write(tmp_path / "my" / f"{name}.safetensors", tensors)
        return ComponentWeights.from_files("t", [path])

    path = lora_files.write(tmp_path / "my" / "w", {"x.weight": torch.ones(3, 5)})
    weights = ComponentWeights.from_files("t", [path])
    for name, size in (("a", 1.0), ("b", 1e25), ("c", 1.0)):
        weights = weights.adapted(halves(name, size))
    with warnings.catch_warnings(), pytest.raises(NonFiniteTensor) as caught:
        warnings.simplefilter("error")
        weights.load({"x": WeightSlot("x.weight", (3, 5), F32)})
    assert str(caught.value).startswith(
        "t: 1 weights are beyond float32 with lora my/b.safetensors merged: x.weight ("
    )
    assert {item.file.name for item in caught.value.stored} == {"b.safetensors"}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("tail", [(), (3, 2)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged(
    tmp_path: Path, alpha: float | None, tail: tuple[int, ...], kind: torch.dtype
) -> None:
    rank, strength = 4, 0.7
    weight = torch.randn(11, 5, *tail).to(kind)
    down = torch.randn(rank, 5, *tail).to(kind)
    up = torch.randn(11, rank, *(1 for _ in tail)).to(kind)
    bias = torch.randn(11).to(kind)
    halves = {"net.x.lora_A.weight": down, "net.x.lora_B.weight": up}
    if alpha is not None:
        halves["net.x.alpha"] = torch.tensor(alpha)
    base = saved(tmp_path / "w", {"x.weight": weight, "x.bias": bias})
    adapter = saved(tmp_path / "a", halves).under("net.")
    merged = base.adapted(adapter, strength)
    shapes = {"x__weight": tuple(weight.shape), "x__bias": (11,)}
    factor = strength * (1 if alpha is None else alpha / rank)
    change = up.double().reshape(11, rank) @ down.double().reshape(rank, -1)
    exact = weight.double() + factor * change.reshape(weight.shape)
    ours = loaded(merged, **shapes)
    assert np.allclose(ours["x.weight"], exact.numpy(), rtol=1e-5, atol=1e-5)
    assert np.array_equal(ours["x.bias"], bias.float().numpy())
    half = loaded(merged, BF16, **shapes)["x.weight"]
    rounded = torch.from_numpy(ours["x.weight"]).bfloat16().float().numpy()
    assert np.array_equal(half, rounded)  # merged before it is rounded, not after
    for axis in range(weight.ndim):
        part = merged["x.weight"].sliced(axis, 1, 2).read()
        whole = ours["x.weight"].take([1], axis)
        assert np.allclose(part, whole, rtol=1e-5, atol=1e-5)


def test_what_of_an_adapter_fits_nothing_is_unused(rng: np.random.Generator) -> None:
    base, _ = held({"x.weight": random(rng, 3, 2), "y.weight": random(rng, 3, 2)})
    pair = {"lora_A.weight": random(rng, 1, 2), "lora_B.weight": random(rng, 3, 1)}
    halves = {f"{stem}.{name}": pair[name] for stem in "xz" for name in pair}
    halves["y.lora_B.weight"] = pair["lora_B.weight"]
    shapes = {"x__weight": (3, 2), "y__weight": (3, 2)}
    assert problems(base.adapted(held(halves)[0]), **shapes) == [
        "t: 3 weights unused: z.lora_A.weight, z.lora_B.weight, y.lora_B.weight"
    ]
    wrong = halves | {"x.lora_A.weight": random(rng, 1, 3)}
    assert (
        "x.weight (x.weight (3, 2) and x.lora_A.weight (1, 3) and x.lora_B.weight "
        "(3, 1) do not fit as weight, down, up and alpha)"
    ) in problems(base.adapted(held(wrong)[0]), **shapes)[1]


def test_two_adapters_of_equal_names_add_up(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    weight = random(rng, 5, 3)
    weights, _ = held({"net.x.weight": weight, "other.x.weight": weight})
    weights = weights.renamed("net.{}".format)
    exact = weight.astype(np.float64)
    for index in range(2):
        down, up = random(rng, 2, 3), random(rng, 5, 2)
        halves = {"x.lora_A.weight": down, "x.lora_B.weight": up}
        halves[f"spare.{index}"] = down.copy()
        adapter = saved(
            tmp_path / f"{index}", {n: torch.from_numpy(a) for n, a in halves.items()}
        )
        weights = weights.adapted(adapter, 0.5)
        exact += 0.5 * up.astype(np.float64) @ down
    weights = weights.renamed({"net.x.weight": "x.weight"}).under("net.")
    assert problems(weights, ("spare*",), x__weight=(5, 3)) == [
        "t: 2 weights unused: spare.0, spare.1"
    ]
    ours = weights.load({"x": WeightSlot("x.weight", (5, 3), F32)})["x"]
    assert np.allclose(values(ours), exact, rtol=1e-5, atol=1e-5)


def test_numbers_that_are_not_known_cannot_be_computed_with(
    rng: np.random.Generator,
) -> None:
    weights, _ = held({"w": random(rng, 4, 3), "w.scale": np.ones(1, np.int64)})
    assert problems(weights.dequantised("{}.scale".format), w=(4, 3)) == [
        "t: 1 weights of a dtype that cannot be cast: w (float32/int64 from w (4, 3) "
        "and w.scale (1,))"
    ]


def test_nothing_is_read_before_it_is_loaded_and_then_once(
    rng: np.random.Generator,
) -> None:
    arrays = {
        "a.weight": rng.integers(0, 64, (12, 4), np.uint8),
        "a.scale": random(rng, 1),
        "b.weight": random(rng, 6, 5),
    }
    pair = {"b.lora_A.weight": random(rng, 2, 5), "b.lora_B.weight": random(rng, 6, 2)}
    base, reads = held(arrays, {"a.weight": DType.float8_e4m3fn})
    adapter, adapter_reads = held(pair)
    weights = base.dequantised(lambda n: n.replace("weight", "scale")).adapted(adapter)

    def recipe(source: ComponentWeights, name: str) -> AbstractTensor:
        if name in ("q", "k", "v"):
            return source["a.weight"].split(1, 1, 1)["qkv".index(name)]
        return source["b.weight"]

    weights = weights.through(recipe)
    specs = {name: WeightSpec((4, 4), F32) for name in "qkv"}
    assert weights.problems(specs | {"b": WeightSpec((6, 5), F32)}) == []
    assert reads == adapter_reads == []
    slots = {name: WeightSlot(name, (4, 4), F32) for name in "qkv"}
    slots["b.1"] = WeightSlot("b", (6, 2), F32, columns=(3, 5))
    found = weights.load(slots)
    assert sorted(reads) == ["a.scale"] * 3 + ["a.weight"] * 3 + ["b.weight"]
    assert sorted(adapter_reads) == sorted(pair)
    exact = torch.from_numpy(arrays["a.weight"]).view(torch.float8_e4m3fn).double()
    exact *= float(arrays["a.scale"][0])
    ours = np.concatenate([values(found[name]) for name in "qkv"])
    assert np.allclose(ours, exact.numpy(), rtol=2**-23, atol=0)
    whole = arrays["b.weight"].astype(np.float64)
    whole += pair["b.lora_B.weight"].astype(np.float64) @ pair["b.lora_A.weight"]
    assert np.allclose(values(found["b.1"]), whole[:, 3:5], rtol=1e-5, atol=1e-5)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    count, side = 8, 1024
    tensors: dict[str, torch.Tensor] = {}
    for index in range(count):
        tensors[f"{index}"] = torch.randn(side, side).to(torch.float8_e4m3fn)
        tensors[f"{index}.scale"] = torch.tensor(0.5)
    weights = saved(tmp_path / "w", tensors).dequantised("{}.scale".format)
    slots = {f"{i}": WeightSlot(f"{i}", (side, side), BF16) for i in range(count)}
    tracemalloc.start()
    arrays = weights.load(slots)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(arrays) == count
    # The results, 2 bytes each, and of one tensor a few float32 arrays.
    assert peak < (2 * count + 4 * 5) * side**2


def test_a_part_of_a_matrix_is_computed_alone(rng: np.random.Generator) -> None:
    """Not as the whole, of which it then is a view."""
    weights, _ = held({"w": random(rng, 6, 4), "s": random(rng, 3, 2)})
    tensor = scaled(weights["w"], weights["s"])
    assert type(tensor.sliced(0, 2, 4)) is type(tensor)
    assert type(tensor.sliced(0, 1, 3)) is type(part_of_whole(tensor, 0, 1, 3))
