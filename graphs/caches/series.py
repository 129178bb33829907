"""Forecasts as weighted sums of known values, and how far off they were."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, Graph, Module, TensorType, TensorValue, ops

from ..sampler import per_sample

_SHAPE = ("batch", "seq_len", "channels")


def add_weighted_sum(
    module: Module, name: str, dtype: DType, device: DeviceRef, *, terms: int
) -> None:
    """Adds ``weights, value 0, ..., value terms-1 -> sum of weight * value``.

    ``weights`` float32 ``(B, terms)``, so that samples may stand at different steps of
    their series; values ``(B, S, C)`` in ``dtype``, summed in float32.
    """
    types = [TensorType(DType.float32, ("batch", terms), device)]
    types += [TensorType(dtype, _SHAPE, device)] * terms
    with Graph(name, input_types=types, module=module) as graph:
        weights, *values = (value.tensor for value in graph.inputs)
        total: TensorValue | None = None
        for index, value in enumerate(values):
            term = per_sample(weights[:, index]) * value.cast(DType.float32)
            total = term if total is None else total + term
        assert total is not None, "a sum has terms"
        graph.output(total.cast(dtype))


def add_relative_error(
    module: Module, name: str, dtype: DType, device: DeviceRef
) -> None:
    """Adds ``forecast, actual -> error``, float32 ``(B,)``.

    ``mean|forecast - actual| / mean|actual|`` over the tokens and channels of each
    sample; both ``(B, S, C)`` in ``dtype``. No epsilon: zeros give inf or NaN, which
    the policy takes for a bad forecast.
    """
    types = [TensorType(dtype, _SHAPE, device)] * 2
    with Graph(name, input_types=types, module=module) as graph:
        forecast, actual = (v.tensor.cast(DType.float32) for v in graph.inputs)
        graph.output(magnitude(forecast - actual) / magnitude(actual))


def magnitude(x: TensorValue) -> TensorValue:
    """Computes each sample's mean absolute value: ``(B, S, C)`` to float32 ``(B,)``."""
    absolute = ops.abs(x.cast(DType.float32))
    return ops.squeeze(ops.squeeze(ops.mean(ops.mean(absolute, 2), 1), 2), 1)
