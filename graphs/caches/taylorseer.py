"""TaylorSeer's arithmetic: finite differences of a tensor over steps, and their sum.

Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with
TaylorSeers", 2025, arXiv:2503.06923. Factor 0 is the tensor itself and is never
copied; factor ``j + 1`` is the difference of factor ``j`` between the two last
computed steps over their gap.
"""

from __future__ import annotations

import math

from max.dtype import DType
from max.graph import DeviceRef, Graph, Module, TensorType

from ..sampler import per_sample


def add_predict(
    module: Module, name: str, dtype: DType, device: DeviceRef, *, order: int
) -> None:
    """Adds ``offset, factor 0, ..., factor order -> prediction``.

    ``sum_j factor_j * offset**j / j!`` with ``offset`` float32 ``(B,)``, the steps
    since the last computed one; tensors ``(B, S_img, C)`` in ``dtype``, summed in
    float32.
    """
    types = _types(dtype, device, order + 1)
    with Graph(name, input_types=types, module=module) as graph:
        offset, *factors = (value.tensor for value in graph.inputs)
        x = per_sample(offset)
        total = factors[order].cast(DType.float32) * (1 / math.factorial(order))
        for j in reversed(range(order)):  # Horner's scheme
            total = total * x + factors[j].cast(DType.float32) * (1 / math.factorial(j))
        graph.output(total.cast(dtype))


def add_update(
    module: Module, name: str, dtype: DType, device: DeviceRef, *, order: int
) -> None:
    """Adds ``1 / gap, new, old factor 0, ..., old factor order-1 -> factors 1..order``.

    ``1 / gap`` float32 ``(B,)``, ``gap`` the steps between the two last computed ones;
    differences are taken in float32 and rounded to ``dtype``.
    """
    types = _types(dtype, device, order + 1)
    with Graph(name, input_types=types, module=module) as graph:
        inverse_gap, new, *old = (value.tensor for value in graph.inputs)
        rate = per_sample(inverse_gap)
        current, factors = new.cast(DType.float32), []
        for factor in old:
            current = (current - factor.cast(DType.float32)) * rate
            factors.append(current.cast(dtype))
        graph.output(*factors)


def _types(dtype: DType, device: DeviceRef, tensors: int) -> list[TensorType]:
    shape = ("batch", "image_seq_len", "channels")
    scalar = TensorType(DType.float32, ("batch",), device)
    return [scalar, *(TensorType(dtype, shape, device) for _ in range(tensors))]
