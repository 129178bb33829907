"""The dtype that a model computes in where none is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from max.driver import Device
from max.dtype import DType

from ..checkpoint import CheckpointFile
from ..checkpoint.safetensors_file import read_header
from ..execution.devices import resolve_dtype
from ..execution.targets import product_dtype

# As files write it.
_FULL: Final = frozenset(["F32", "F64"])


def compute_dtype(
    name: str | None, device: Device, files: Sequence[Path], file: CheckpointFile | None
) -> DType:
    """Returns the dtype asked for, or the one that suits device and weights.

    That is bfloat16 on a GPU, and on a processor that multiplies it; there float32
    stays where most of a model's weights are stored so. Elsewhere it is float32.

    Args:
        name: As :func:`~..execution.devices.resolve_dtype` takes it.
        device: Where the model runs.
        files: The weights of its folder.
        file: A file that holds others.

    Raises:
        RequestError: There is no such dtype.
        ModelLoadError: A file is damaged.
    """
    found = resolve_dtype(name, device)
    is_open = name is None and device.is_host
    if not is_open or product_dtype(DType.bfloat16) != DType.bfloat16:
        return found
    full = total = 0
    for header in (*map(read_header, files), {} if file is None else file.tensors):
        for tensor in header.values():
            count = math.prod(tensor.shape)
            total += count
            full += count * (tensor.code in _FULL)
    return DType.float32 if 2 * full > total else DType.bfloat16
