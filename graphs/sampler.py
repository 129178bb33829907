"""The sampler's arithmetic: one Euler step and classifier-free guidance, in float32.

Scalars come as one value per sample, so that samples at different steps of their own
schedules can share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from max.dtype import DType
from max.graph import DeviceRef, Graph, Module, TensorType, TensorValue, ops


def add_euler_step(module: Module, name: str, dtype: DType, device: DeviceRef) -> None:
    """Adds ``latents, prediction, dt -> latents``: ``latents + dt * prediction``.

    ``latents`` float32 and ``prediction`` in ``dtype``, both ``(B, S_img, C)``; ``dt``
    float32 ``(B,)`` is the difference of two sigmas, negative while denoising.
    """
    shape = ("batch", "image_seq_len", "channels")
    types = [
        TensorType(DType.float32, shape, device),
        TensorType(dtype, shape, device),
        TensorType(DType.float32, ("batch",), device),
    ]
    with Graph(name, input_types=types, module=module) as graph:
        latents, prediction, dt = (value.tensor for value in graph.inputs)
        graph.output(latents + per_sample(dt) * prediction.cast(DType.float32))


def add_kept_picture(module: Module, name: str, device: DeviceRef) -> None:
    """Adds ``latents, clean, noise, mask, sigma -> latents``.

    ``mask * latents + (1 - mask) * (sigma * noise + (1 - sigma) * clean)``, in the
    order diffusers computes it: what the mask leaves out is the known picture at the
    noise level of ``latents``. All float32 ``(B, S_img, C)``, but ``sigma`` ``(B,)``.
    """
    shape = ("batch", "image_seq_len", "channels")
    types = [TensorType(DType.float32, shape, device)] * 4
    types.append(TensorType(DType.float32, ("batch",), device))
    with Graph(name, input_types=types, module=module) as graph:
        latents, clean, noise, mask, sigma = (value.tensor for value in graph.inputs)
        level = per_sample(sigma)
        known = level * noise + (1.0 - level) * clean
        graph.output((1.0 - mask) * known + mask * latents)


def add_guidance(module: Module, name: str, dtype: DType, device: DeviceRef) -> None:
    """Adds ``conditional, unconditional, scale -> prediction``.

    ``unconditional + scale * (conditional - unconditional)``, in the order diffusers
    computes it; ``scale`` float32 ``(B,)``.
    """
    with _guidance_graph(module, name, dtype, device) as (graph, values):
        guided = _guided(*values)
        graph.output(guided.cast(dtype))


def add_rescaled_guidance(
    module: Module, name: str, dtype: DType, device: DeviceRef
) -> None:
    """Adds ``conditional, unconditional, scale -> prediction``.

    As :func:`add_guidance`, then each token is scaled to the length over its channels
    of the conditional one. A guided token of zeros stays zeros.
    """
    with _guidance_graph(module, name, dtype, device) as (graph, values):
        guided = _guided(*values)
        wanted, found = _length(values[0]), _length(guided)
        is_zero = ops.equal(found, ops.constant(0.0, DType.float32, device))
        one = ops.constant(1.0, DType.float32, device)
        graph.output((guided * (wanted / ops.where(is_zero, one, found))).cast(dtype))


@contextmanager
def _guidance_graph(
    module: Module, name: str, dtype: DType, device: DeviceRef
) -> Iterator[tuple[Graph, tuple[TensorValue, TensorValue, TensorValue]]]:
    """Opens a graph of guidance, and yields it with its inputs in float32."""
    shape = ("batch", "image_seq_len", "channels")
    types = [
        TensorType(dtype, shape, device),
        TensorType(dtype, shape, device),
        TensorType(DType.float32, ("batch",), device),
    ]
    with Graph(name, input_types=types, module=module) as graph:
        first, second, scale = (value.tensor for value in graph.inputs)
        yield graph, (first.cast(DType.float32), second.cast(DType.float32), scale)


def _guided(
    conditional: TensorValue, unconditional: TensorValue, scale: TensorValue
) -> TensorValue:
    return unconditional + per_sample(scale) * (conditional - unconditional)


def _length(x: TensorValue) -> TensorValue:
    """Computes the Euclidean length over the channels, ``(B, S, 1)``."""
    return ops.sqrt(ops.sum(x * x, axis=-1))


def per_sample(x: TensorValue) -> TensorValue:
    """Reshapes ``(B,)`` to ``(B, 1, 1)``, to scale the samples of ``(B, S, C)``."""
    return ops.unsqueeze(ops.unsqueeze(x, 1), 2)
