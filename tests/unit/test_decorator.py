"""The decorator against its documented example, schedules and a float64 oracle."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from decorated import computed_steps, replaying
from max.driver import CPU, Buffer
from max.dtype import DType
from processes import run_python

from max_diffusion.decorator import CacheInfo, taylor_seer
from max_diffusion.errors import RequestError

DOCUMENTED = [0, 1, 4, 9, 14, 25, 33, 49, 61, 81]


@taylor_seer(warmup_steps=4, skip_interval_steps=2, n_derivatives=1)
class TimestepSquared(torch.nn.Module):
    """The document's example."""

    def forward(self, timestep: Any) -> Any:
        return timestep**2


@taylor_seer(warmup_steps=2, skip_interval_steps=3)
class Scaled:
    """What a user's own class may look like."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: np.ndarray, *, shift: float = 0.0) -> np.ndarray:
        """Scales."""
        return self.scale * x**2 + shift


def oracle(
    values: np.ndarray, computed: Sequence[int], order: int
) -> Iterator[np.ndarray]:
    """TaylorSeer as published, factor by factor, float64."""
    factors: list[np.ndarray] = []
    last = 0
    for step, value in enumerate(values.astype(np.float64)):
        if step in computed:
            old, factors = factors, [value]
            for factor in old[:order]:
                factors.append((factors[-1] - factor) / (step - last))
            last = step
            yield value
        else:
            x = step - last
            terms = [f * x**j / math.factorial(j) for j, f in enumerate(factors)]
            yield np.sum(terms, axis=0)


def test_documented_example_gives_the_documented_numbers() -> None:
    model: Any = TimestepSquared()
    model.reset_cache(warmup_steps=4, skip_interval_steps=2)
    outputs = [model(torch.tensor(i, dtype=torch.float32)) for i in range(10)]
    assert [float(output) for output in outputs] == DOCUMENTED
    assert {(o.shape, o.dtype) for o in outputs} == {(torch.Size(), torch.float32)}
    assert model.cache_info() == CacheInfo(computed=7, skipped=3)
    assert isinstance(model, torch.nn.Module)
    assert not model.state_dict()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("make", [np.asarray, lambda i, dtype: dtype(i)])
def test_example_gives_the_documented_numbers_in_numpy(make: Any, dtype: Any) -> None:
    inputs = [make(i, dtype=dtype) for i in range(10)]
    values = [np.multiply(x, x, out=np.array(0, dtype)) for x in inputs]
    if not isinstance(inputs[0], np.ndarray):
        values = [value[()] for value in values]
    _, call = replaying(values, warmup_steps=4, skip_interval_steps=2, n_derivatives=1)
    outputs = [call() for _ in values]
    assert [float(output) for output in outputs] == DOCUMENTED
    assert {type(o) for o in outputs} == {type(values[0])}
    assert {(o.shape, o.dtype) for o in outputs} == {((), np.dtype(dtype))}


@pytest.mark.parametrize(
    ("warmup", "interval", "expected"),
    [
        (3, 5, [0, 1, 2, *range(7, 50, 5)]),
        (4, 5, [0, 1, 2, 3, *range(8, 50, 5)]),
        (9, 5, [*range(9), *range(13, 50, 5)]),
        (3, 2, [0, 1, 2, *range(4, 50, 2)]),
        (3, 6, [0, 1, 2, *range(8, 50, 6)]),
        (1, 5, list(range(0, 50, 5))),
        (50, 7, list(range(50))),
        (2, 1, list(range(50))),
        (1, 100, [0]),
    ],
)
def test_interval_computes_the_official_steps(
    warmup: int, interval: int, expected: list[int]
) -> None:
    cached = taylor_seer(warmup_steps=warmup, skip_interval_steps=interval)(np.ones)
    assert computed_steps(cached, 50, 2) == expected
    assert cached.cache_info() == (len(expected), 50 - len(expected))


def test_compute_step_map_decides_alone_but_for_the_first_call() -> None:
    flags = [False, False, True, False, True, False, False]
    for mode in ("interval", "auto"):
        cached = taylor_seer(warmup_steps=4, compute_step_map=flags, mode=mode)(np.ones)
        assert computed_steps(cached, 9, 2) == [0, 2, 4, 7, 8]


def test_first_call_computes_also_without_arguments() -> None:
    _, call = replaying([np.ones(2)], compute_step_map=[False])
    assert call().tolist() == [1, 1]


def test_reset_begins_a_new_sequence_with_the_decorators_values() -> None:
    cached = taylor_seer(warmup_steps=2, skip_interval_steps=3)(np.ones)
    usual = [0, 1, 4, 7]
    assert computed_steps(cached, 8, 2) == usual
    cached.reset_cache(warmup_steps=4)
    assert cached.cache_info() == (0, 0)
    assert computed_steps(cached, 8, 2) == [0, 1, 2, 3, 6]
    cached.reset_cache(skip_interval_steps=5)
    assert computed_steps(cached, 8, 2) == [0, 1, 6]
    cached.reset_cache(compute_step_map=[True, False, False, True, False])
    assert computed_steps(cached, 8, 2) == [0, 3, 5, 6, 7]
    cached.reset_cache()
    assert computed_steps(cached, 8, 2) == usual


def test_reset_forgets_all_outputs() -> None:
    values = np.array([5.0, 7.0, 9.0, 1.0, 9.0])
    output, call = replaying(values, compute_step_map=[True, True, False])
    assert [call() for _ in range(3)] == [5, 7, 9]
    output.reset_cache(compute_step_map=[True, False])
    assert [call() for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("order", range(5))
def test_forecasts_equal_the_oracle(order: int, make: Any) -> None:
    values = np.random.default_rng(order).standard_normal((40, 3, 5))
    computed = [0, 1, 2, 5, 6, 7, 8, 9, 13, 15, 20, 21, 22, 23, 24, 30]
    _, call = replaying(
        make(values),
        n_derivatives=order,
        compute_step_map=[step in computed for step in range(40)],
    )
    for step, expected in enumerate(oracle(values, computed, order)):
        np.testing.assert_allclose(
            call(), expected, rtol=1e-10, atol=1e-9, err_msg=f"step {step}"
        )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("numpy", torch.float16), ("torch", torch.float16), ("torch", torch.bfloat16)],
)
def test_narrow_types_are_summed_wider_and_rounded_once(kind: str, dtype: Any) -> None:
    values = (torch.rand((9, 500), generator=torch.manual_seed(0)) + 1).to(dtype)
    computed = [0, 1, 2, 8]
    _, call = replaying(
        values.numpy() if kind == "numpy" else values,
        compute_step_map=[step in computed for step in range(9)],
    )
    # Over gaps of 1 the weights are halves, so that float32 sums are exact.
    for expected in oracle(values.double().numpy(), computed, 2):
        output = torch.as_tensor(call())
        exact = torch.from_numpy(expected).to(dtype)
        torch.testing.assert_close(output, exact, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_torch_forecast_keeps_the_dtype_and_carries_no_gradient(dtype: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))

    @taylor_seer(warmup_steps=2, skip_interval_steps=2)
    def scaled(x: float) -> torch.Tensor:
        return weight * x

    computed, _, forecast = (scaled(float(x)) for x in (1, 2, 3))
    assert computed.requires_grad
    assert not forecast.requires_grad
    assert forecast.dtype == dtype
    assert forecast.tolist() == [3, 3, 3]


@pytest.mark.parametrize("shape", [(), (4, 3), (0,)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_buffers_come_back_as_buffers(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal((6, *shape)).astype(dtype)
    flags = [True, True, False, True, False, False]
    _, expected = replaying(values, compute_step_map=flags)
    buffers = [Buffer.from_numpy(np.array(value)) for value in values]
    _, call = replaying(buffers, compute_step_map=flags)
    for _ in values:
        output = call()
        assert isinstance(output, Buffer)
        assert output.device == CPU()
        want = np.asarray(expected())
        assert (output.to_numpy().dtype, tuple(output.shape)) == (want.dtype, shape)
        np.testing.assert_array_equal(output.to_numpy(), want)


@pytest.mark.parametrize("shape", [(), (4, 100)])
def test_bfloat16_buffers_equal_torch(shape: tuple[int, ...]) -> None:
    tensors = torch.randn((6, *shape), generator=torch.manual_seed(1)).bfloat16()
    if shape:
        tensors[0, 0, 0] = math.nan
        tensors[1, 0, 1] = -math.inf
    flags = [True, True, True, False, False, False]
    _, expected = replaying(tensors, compute_step_map=flags)
    bits = tensors.view(torch.int16).numpy().view(np.uint16)
    buffers = [
        Buffer.from_numpy(np.array(each)).view(DType.bfloat16, shape) for each in bits
    ]
    _, call = replaying(buffers, compute_step_map=flags)
    for _ in tensors:
        output = call()
        assert output.dtype == DType.bfloat16
        words = np.array(output.view(DType.uint16, shape).to_numpy(), copy=True)
        got = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)
        torch.testing.assert_close(got, expected(), rtol=0, atol=0, equal_nan=True)


class OwnArray:
    """An array of some other library of the Python array API."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)
        self.shape, self.dtype = self.values.shape, self.values.dtype
        self.device = "own"

    def __array_namespace__(self) -> Any:
        return OwnNamespace

    def __mul__(self, other: float) -> OwnArray:
        return OwnArray(self.values * other)

    def __radd__(self, other: int) -> OwnArray:
        return OwnArray(other + self.values)

    def __add__(self, other: OwnArray) -> OwnArray:
        return OwnArray(self.values + other.values)


class OwnNamespace:
    float32 = np.float32
    isdtype = staticmethod(np.isdtype)
    result_type = staticmethod(np.result_type)

    @staticmethod
    def asarray(array: OwnArray, *, dtype: Any, copy: bool | None = None) -> OwnArray:
        return OwnArray(np.array(array.values, dtype, copy=copy))


def test_arrays_of_other_libraries_come_back_as_they_are() -> None:
    values = [OwnArray(np.full(2, step**2, np.float16)) for step in range(5)]
    _, call = replaying(values, warmup_steps=4, skip_interval_steps=2, n_derivatives=1)
    outputs = [call() for _ in values]
    assert all(isinstance(output, OwnArray) for output in outputs)
    assert outputs[4].dtype == np.float16
    assert outputs[4].values.tolist() == [14, 14]


@pytest.mark.parametrize("library", ["numpy", "torch", "buffer"])
def test_writing_to_an_output_does_not_reach_the_history(library: str) -> None:
    numbers = [np.full(2, float(step)) for step in range(6)]
    make: Any = {
        "numpy": lambda x: x,
        "torch": torch.from_numpy,
        "buffer": Buffer.from_numpy,
    }[library]
    outputs = [make(x) for x in numbers]
    flags = [True, True, False, False, False, False]
    _, call = replaying(outputs, compute_step_map=flags, n_derivatives=1)
    got = []
    for _ in outputs:
        output = call()
        got.append(float(np.from_dlpack(output)[0]))
        output[0] = 99.0
    assert got == [0, 1, 2, 3, 4, 5]


def test_instances_interleaved_equal_instances_in_sequence() -> None:
    inputs = np.random.default_rng(2).standard_normal((12, 4))

    def run(model: Any) -> list[np.ndarray]:
        return [model(x) for x in inputs]

    first, second = run(Scaled(1.5)), run(Scaled(-3))
    models: list[Any] = [Scaled(1.5), Scaled(-3)]
    both = [[model(x) for model in models] for x in inputs]
    np.testing.assert_array_equal(first, [pair[0] for pair in both])
    np.testing.assert_array_equal(second, [pair[1] for pair in both])
    assert models[0].cache_info() == models[1].cache_info() == (5, 7)
    assert not np.array_equal(first[2], 1.5 * inputs[2] ** 2)


def test_two_decorations_of_one_function_share_nothing() -> None:
    decorate = taylor_seer(skip_interval_steps=2)
    first, second = decorate(np.ones), decorate(np.ones)
    first(2)
    assert (first.cache_info(), second.cache_info()) == ((1, 0), (0, 0))


def test_new_output_shape_or_dtype_begins_a_new_history() -> None:
    values = [
        *(np.full(2, v, np.float32) for v in (1, 2)),
        *(np.full(3, v, np.float32) for v in (5, 0)),
        *(np.full(3, v, np.float64) for v in (7, 0, 9, 0)),
    ]
    flags = [True, True, True, False, True, False, True, False]
    _, call = replaying(values, compute_step_map=flags)
    outputs = [call() for _ in values]
    # Of its own form, one output is known at steps 3 and 5, and two at step 7.
    assert outputs[3].tolist() == [5, 5, 5]
    assert outputs[5].tolist() == [7, 7, 7]
    assert outputs[7].tolist() == [10, 10, 10]
    assert [outputs[3].dtype, outputs[7].dtype] == [np.float32, np.float64]


def test_new_output_device_begins_a_new_history() -> None:
    values = [torch.ones(2, device="meta"), torch.ones(2), torch.zeros(2)]
    _, call = replaying(values, compute_step_map=[True, True, False])
    outputs = [call() for _ in values]
    assert outputs[2].tolist() == [1, 1]


def test_new_argument_shape_computes() -> None:
    model: Any = Scaled(2)
    for size in (2, 2, 2, 3, 3, 2):
        assert model(np.ones(size)).shape == (size,)
    assert model.cache_info() == (5, 1)
    model = Scaled(2)
    shapes = [model(x=np.ones(size)).shape for size in (2, 2, 5)]
    assert shapes == [(2,), (2,), (5,)]


def test_exception_leaves_the_state_as_it_was() -> None:
    failing = False

    @taylor_seer(warmup_steps=2, skip_interval_steps=2, mode="interval")
    def squared(x: np.float64) -> np.float64:
        if failing:
            raise KeyError("user's own")
        return x**2

    expected = [squared(np.float64(x)) for x in range(8)]
    squared.reset_cache()
    got = []
    for x in range(8):
        failing = True
        before = squared.cache_info()
        if x not in (2, 4, 6):
            for _ in range(2):
                with pytest.raises(KeyError, match="user's own"):
                    squared(np.float64(x))
            assert squared.cache_info() == before
        failing = False
        got.append(squared(np.float64(x)))
    assert got == expected
    assert squared.cache_info() == (5, 3)


def test_wrong_output_leaves_the_state_as_it_was() -> None:
    values = [np.ones(2), (1, 2), np.ones(2), np.ones(2)]
    output, call = replaying(values, warmup_steps=2, skip_interval_steps=2)
    call()
    with pytest.raises(RequestError):
        call()
    assert output.cache_info() == (1, 0)
    call()
    call()
    assert output.cache_info() == (2, 1)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ((np.ones(2), np.ones(2)), "tuple"),
        ([1.0], "list"),
        (None, "NoneType"),
        (2.5, "float"),
        (np.ones(2, np.int64), "int64"),
        (np.ones(2, np.complex64), "complex64"),
        (np.True_, "bool"),
        (torch.ones(2, dtype=torch.int32), "torch.int32"),
        (Buffer.from_numpy(np.ones(2, np.int32)), "int32"),
    ],
)
def test_output_must_be_one_floating_point_array(output: object, kind: str) -> None:
    cached = taylor_seer()(lambda: output)
    message = f"^taylor_seer: the output must be one floating-point array, got {kind}$"
    with pytest.raises(RequestError, match=message):
        cached()


WRONG = [
    ({"warmup_steps": 0}, "warmup_steps must be at least 1, got 0"),
    ({"warmup_steps": 1.5}, "warmup_steps must be an int, got 1.5"),
    ({"skip_interval_steps": 0}, "skip_interval_steps must be at least 1, got 0"),
    ({"compute_step_map": {True}}, r"sequence of True and False, got \{True\}"),
    ({"compute_step_map": [1, 0]}, r"sequence of True and False, got \[1, 0\]"),
    ({"compute_step_map": "yes"}, "sequence of True and False, got 'yes'"),
]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *WRONG,
        ({"n_derivatives": -1}, "n_derivatives must be at least 0, got -1"),
        ({"max_interval": 0}, "max_interval must be at least 1, got 0"),
        ({"mode": "fast"}, "mode must be interval, auto, got 'fast'"),
        ({"tolerance": 0}, "tolerance must be above 0, got 0"),
        ({"tolerance": math.nan}, "tolerance must be a number of 0 or more, got nan"),
    ],
)
def test_decorator_refuses_values_out_of_range(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"^taylor_seer: .*{message}$"):
        taylor_seer(**given)


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_reset_refuses_values_out_of_range_and_goes_on(
    given: Any, message: str
) -> None:
    cached = taylor_seer(warmup_steps=2, skip_interval_steps=3)(np.ones)
    cached(2)
    with pytest.raises(RequestError, match=f"^taylor_seer: .*{message}$"):
        cached.reset_cache(**given)
    assert cached.cache_info() == (1, 0)


def test_decorator_refuses_what_cannot_be_called_or_has_a_cache() -> None:
    with pytest.raises(RequestError, match=r"^taylor_seer: 3 cannot be called$"):
        taylor_seer()(cast("Any", 3))
    with pytest.raises(RequestError, match=r"Path has no forward or __call__$"):
        taylor_seer()(type("Path", (), {}))
    with pytest.raises(RequestError, match=r"Scaled already has a cache$"):
        taylor_seer()(Scaled)


def test_class_stays_what_it_was() -> None:
    original = inspect.unwrap(Scaled)
    model = Scaled(2)
    assert original is not Scaled
    assert isinstance(model, original)
    assert "reset_cache" not in dir(original)
    assert (Scaled.__name__, Scaled.__doc__) == (original.__name__, original.__doc__)
    assert Scaled.__module__ == original.__module__
    assert Scaled.__call__.__doc__ == "Scales."
    assert inspect.signature(Scaled) == inspect.signature(original)
    assert model(np.ones(1), shift=1.0).tolist() == [3]


def test_function_stays_what_it_was() -> None:
    def shifted(x: np.ndarray, *, by: float = 1.0) -> np.ndarray:
        """Shifts."""
        return x + by

    cached = taylor_seer()(shifted)
    assert (cached.__name__, cached.__doc__) == ("shifted", "Shifts.")
    assert inspect.signature(cached) == inspect.signature(shifted)
    assert cached(np.ones(1), by=3.0).tolist() == [4]


@pytest.mark.parametrize("base", [object, torch.nn.Module])
def test_a_class_with_forward_is_called_either_way(base: Any) -> None:
    @taylor_seer(skip_interval_steps=4)
    class Model(base):  # type: ignore[misc]  # either base
        def forward(self, x: np.ndarray) -> np.ndarray:
            return x

    model: Any = Model()
    outputs = [model(np.ones(2)), model.forward(np.zeros(2)), model(np.zeros(2))]
    assert [output.tolist() for output in outputs] == [[1, 1]] * 3
    assert model.cache_info() == (1, 2)


def test_frozen_and_slotted_classes_and_subclasses_work() -> None:
    @dataclass(frozen=True, slots=True)
    class Frozen:
        scale: float

        def __call__(self, x: np.float32) -> np.float32:
            return self.scale * x

    base: Any = taylor_seer(skip_interval_steps=2)(Frozen)

    class Sub(base):  # type: ignore[misc]  # made at run time
        def __call__(self, x: np.float32) -> Any:
            return super().__call__(x) + 1

    model = Sub(3.0)
    assert [model(np.float32(x)) for x in (1, 2)] == [4, 4]
    assert model.cache_info() == (1, 1)


def test_instances_and_bound_methods_are_functions_too() -> None:
    plain = inspect.unwrap(Scaled)(2)
    for target in (plain, plain.__call__):
        cached = taylor_seer(skip_interval_steps=3)(target)
        assert computed_steps(cached, 5, np.ones(2)) == [0, 3]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_go_on_by_themselves(again: Any) -> None:
    x = torch.arange(8.0)
    model = TimestepSquared()
    for step in range(4):
        model(x[step])
    other = again(model)
    for step in range(4, 8):
        assert model(x[step]) == DOCUMENTED[step]
    assert other.cache_info() == (4, 0)
    for step in range(4, 8):
        assert other(x[step]) == DOCUMENTED[step]


def test_numpy_functions_load_no_torch() -> None:
    code = """
import sys
import numpy as np
from max_diffusion.decorator import taylor_seer
cached = taylor_seer(skip_interval_steps=2)(np.ones)
cached(2); cached(2)
print(*cached.cache_info(), "torch" in sys.modules)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "1 1 False\n"), done.stderr
