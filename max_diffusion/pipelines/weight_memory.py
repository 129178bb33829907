"""Whether a model's weights have room, told before anything compiles."""

from __future__ import annotations

import math
from typing import Final

from max.driver import Device
from max.dtype import DType

from graphs.weights import WeightSlot

from ..checkpoint import ComponentWeights
from ..core.host_memory import free_memory, host_memory
from ..errors import DeviceError
from ..execution.targets import product_dtype
from .loading import OpenedComponents

# What part of a host's memory weights may take before it is asked how much is free:
# asking takes longer than all the weights of a small model.
_MUCH: Final = 8


def slot_bytes(slot: WeightSlot) -> int:
    """Bytes of what fills a slot, at its own dtype, however files store it."""
    return math.prod(slot.shape) * slot.dtype.size_in_bytes


def weight_bytes(opened: OpenedComponents, device: Device) -> int:
    """Bytes that weights take of a device's memory, once they are loaded.

    Args:
        opened: Components whose files are checked.
        device: Where the weights will be. What a host maps from files as it lies there
            is not counted: it can go.
    """
    return sum(
        slot_bytes(slot)
        for needs, weights in opened.sources.values()
        for slot in needs.slots.values()
        if not (device.is_host and _is_mapped(slot, weights))
    )


def check_weights_fit(opened: OpenedComponents, device: Device, dtype: DType) -> None:
    """Checks that the weights fit in what a host or a GPU has free.

    What the host maps from files as it lies there is not counted: it can go.

    Args:
        opened: Components whose files are checked.
        device: Where the weights will be.
        dtype: Compute dtype, for the message.

    Raises:
        DeviceError: They do not fit.
    """
    needed, there = weight_bytes(opened, device), _memory(device)
    where = "this machine has" if device.is_host else "the device has free"
    ends = ""
    if device.is_host and there // _MUCH < needed <= there:
        there, where = min(there, free_memory(device)), "this machine has free"
        ends = "end what else takes memory, or "
    if needed <= there:
        return
    # Nearly all of them are of the compute dtype.
    halves = dtype == DType.float32 and (
        not device.is_host or product_dtype(DType.bfloat16) == DType.bfloat16
    )
    fits = halves and needed // 2 <= there
    advice = "take dtype bfloat16" if fits else "take a smaller model or another device"
    raise DeviceError(
        f"weights: {_gib(needed)} expected to fit as {dtype.name}, whatever they are "
        f"stored in, but {where} {_gib(there)}; {ends}{advice}"
    )


def memory_beside_weights(opened: OpenedComponents, device: Device) -> int:
    """Bytes of a host's memory, or of what a GPU has free, that weights will leave.

    Below 0 where they do not fit.

    Args:
        opened: Components whose files are checked, and whose weights are not loaded.
        device: Where the weights will be.
    """
    return _memory(device) - weight_bytes(opened, device)


def _memory(device: Device) -> int:
    return host_memory() if device.is_host else int(device.stats["free_memory"])


def _is_mapped(slot: WeightSlot, weights: ComponentWeights) -> bool:
    if slot.is_packed or slot.others or slot.columns is not None:
        return False
    tensor = weights[slot.tensor]
    return tensor.dtype == slot.dtype and tensor.stored == (tensor,)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
