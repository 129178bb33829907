"""A component's weights: strict against what its graphs ask for, cast on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import final

import numpy as np
from max.driver import Buffer
from max.dtype import DType

from graphs.weights import WeightSlot, WeightSpec

from ..core.buffers import bfloat16_bits
from ..errors import ModelLoadError
from .safetensors_file import StoredTensor, read_header

_FLOATS = (DType.float64, DType.float32, DType.float16, DType.bfloat16)
_SHOWN = 10
# Elements checked at once: bounds the temporary mask to 4 MiB.
_CHUNK = 1 << 22


@final
class ComponentWeights:
    """The tensors of one component, mapped, not read.

    Args:
        name: The component, for messages.
        tensors: Where each tensor lies.
    """

    def __init__(self, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.name = name
        self.tensors = tensors

    @classmethod
    def from_files(cls, name: str, files: Sequence[Path]) -> ComponentWeights:
        """Reads the headers of one component's files.

        Raises:
            ModelLoadError: A file is damaged, or two hold the same tensor.
        """
        tensors: dict[str, StoredTensor] = {}
        for path in files:
            for key, tensor in read_header(path).items():
                if key in tensors:
                    raise ModelLoadError(
                        f"{name}: {key} is in {tensors[key].file.name} and in "
                        f"{path.name}; remove the file that does not belong"
                    )
                tensors[key] = tensor
        return cls(name, tensors)

    def problems(
        self, expected: Mapping[str, WeightSpec], ignore: Sequence[str] = ()
    ) -> list[str]:
        """What keeps these weights from being those that the graphs ask for.

        Args:
            expected: Shape and dtype of every weight asked for.
            ignore: Patterns of names that may be left over.

        Returns:
            One text a kind (missing, unused, wrong shape, wrong dtype), with the count
            and the first names; empty if all is well.
        """
        held = self.tensors
        missing = [key for key in expected if key not in held]
        unused = [
            key
            for key in held
            if key not in expected and not any(fnmatchcase(key, p) for p in ignore)
        ]
        shared = [key for key in expected if key in held]
        shapes = [
            f"{key} (expected {expected[key].shape}, got {held[key].shape})"
            for key in shared
            if held[key].shape != expected[key].shape
        ]
        dtypes = [
            f"{key} ({dtype.name if dtype else held[key].code})"
            for key in shared
            if (dtype := held[key].dtype) != expected[key].dtype
            and dtype not in _FLOATS
        ]
        kinds = {
            "missing": missing,
            "unused": unused,
            "of the wrong shape": shapes,
            "of a dtype that cannot be cast": dtypes,
        }
        return [
            f"{self.name}: {len(names)} weights {kind}: {_listed(names)}"
            for kind, names in kinds.items()
            if names
        ]

    def load(
        self, slots: Mapping[str, WeightSlot], *, check_finite: bool = True
    ) -> dict[str, np.ndarray | Buffer]:
        """What fills every slot, in its dtype.

        Whole tensors of equal dtype are mapped without a copy, others are cast.

        Args:
            slots: What the graphs asked for; :meth:`problems` found none.
            check_finite: Refuse NaN and infinity; reads every weight once.

        Raises:
            ModelLoadError: A weight is not finite.
        """
        names = dict.fromkeys(slot.tensor for slot in slots.values())
        if check_finite:
            broken = [name for name in names if not _is_finite(self.tensors[name])]
            if broken:
                raise ModelLoadError(
                    f"{self.name}: {len(broken)} weights hold NaN or infinity: "
                    f"{_listed(broken)}; the file is damaged: download it again"
                )
        return {
            key: _fill(slot, self.tensors[slot.tensor]) for key, slot in slots.items()
        }


def _is_finite(tensor: StoredTensor) -> bool:
    """Whether all exponents are below the one of NaN and infinity."""
    if tensor.dtype not in _FLOATS:
        return True
    bits = tensor.bits().reshape(-1)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        if tensor.dtype == DType.bfloat16:
            if (part & np.uint16(0x7F80) == 0x7F80).any():
                return False
        elif not np.isfinite(part).all():
            return False
    return True


def _fill(slot: WeightSlot, tensor: StoredTensor) -> np.ndarray | Buffer:
    bits = tensor.bits()
    if slot.columns is not None:
        bits = np.ascontiguousarray(bits[:, slice(*slot.columns)])
    if slot.dtype == DType.bfloat16:
        if tensor.dtype != DType.bfloat16:
            bits = bfloat16_bits(bits.astype(np.float32))
        # numpy has no bfloat16: the buffer reads the same bytes as one.
        return Buffer.from_numpy(bits).view(DType.bfloat16, slot.shape)
    if tensor.dtype == DType.bfloat16:
        bits = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(slot.dtype.to_numpy(), copy=False)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
