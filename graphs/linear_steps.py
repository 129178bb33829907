"""Sampler steps that are linear in what they read, with coefficients from the host.

All of it float32. Coefficients come as a row per sample, so that samples at different
steps of their own schedules can share a batch.
"""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, Graph, Module, TensorType, TensorValue

from .sampler import per_sample


def add_linear_step(module: Module, name: str, dtype: DType, device: DeviceRef) -> None:
    """Adds ``latents, prediction, row -> latents``: ``r0 latents + r1 prediction``.

    ``latents`` float32 and ``prediction`` in ``dtype``, both ``(B, S_img, C)``; ``row``
    float32 ``(B, 2)``.
    """
    types = [*_tokens(device, DType.float32, dtype), _row(2, device)]
    with Graph(name, input_types=types, module=module) as graph:
        latents, prediction, row = (value.tensor for value in graph.inputs)
        graph.output(_sum(row, [latents, prediction.cast(DType.float32)]))


def add_multistep_step(
    module: Module, name: str, dtype: DType, device: DeviceRef
) -> None:
    """Adds ``latents, prediction, before, noise, row -> latents, clean``.

    ``r0 latents + r1 prediction + r2 before + r3 noise``, and the clean latents that
    the prediction tells, ``r4 latents + r5 prediction``; ``before`` is what the step
    before gave of those. ``prediction`` is in ``dtype``, all others are float32, and
    all ``(B, S_img, C)``; ``row`` float32 ``(B, 6)``.
    """
    kinds = DType.float32, dtype, DType.float32, DType.float32
    types = [*_tokens(device, *kinds), _row(6, device)]
    with Graph(name, input_types=types, module=module) as graph:
        latents, prediction, before, noise, row = (x.tensor for x in graph.inputs)
        given = [latents, prediction.cast(DType.float32)]
        graph.output(_sum(row, [*given, before, noise]), _sum(row, given, first=4))


def _tokens(device: DeviceRef, *dtypes: DType) -> list[TensorType]:
    shape = ("batch", "image_seq_len", "channels")
    return [TensorType(dtype, shape, device) for dtype in dtypes]


def _row(size: int, device: DeviceRef) -> TensorType:
    return TensorType(DType.float32, ("batch", size), device)


def _sum(row: TensorValue, values: list[TensorValue], *, first: int = 0) -> TensorValue:
    """Sums the values, each times the row's number from ``first`` on."""
    total = None
    for place, value in enumerate(values, first):
        term = per_sample(row[:, place]) * value
        total = term if total is None else total + term
    assert total is not None
    return total
