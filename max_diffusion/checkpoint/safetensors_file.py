"""One safetensors file: its header, checked against its size, and mapped tensors."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import numpy as np
from max.dtype import DType

from ..errors import ModelLoadError
from .reading import FileStamp, check_file, mapped_bytes, short_name, shown
from .tensors import AbstractStoredTensor

_HEADER_BYTES = 8
# Bytes below which copying takes less than mapping: all cores are told when that ends.
_SMALL = 1 << 20
_DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "F64": DType.float64,
        "F32": DType.float32,
        "F16": DType.float16,
        "BF16": DType.bfloat16,
        "F8_E4M3": DType.float8_e4m3fn,
        "F8_E5M2": DType.float8_e5m2,
        "I64": DType.int64,
        "I32": DType.int32,
        "I16": DType.int16,
        "I8": DType.int8,
        "U64": DType.uint64,
        "U32": DType.uint32,
        "U16": DType.uint16,
        "U8": DType.uint8,
        "BOOL": DType.bool,
    }
)


@final
@dataclass(frozen=True, eq=False)
class StoredTensor(AbstractStoredTensor):
    """Where a tensor lies."""

    offset: int
    """Bytes from the start of the file."""
    mapped: np.ndarray | None = None
    """The file's bytes, where they stay mapped; ``None`` maps them for each reading, so
    that a large model's pages do not stay in memory."""

    def read(self) -> np.ndarray:
        """The contents, read-only; bfloat16 and narrower as unsigned bits.

        Mapped; a copy where they are few, or do not lie as their dtype's width asks
        for, as in files whose header has an odd length.
        """
        assert self.dtype is not None, "checked by ComponentWeights.problems"
        width = self.dtype.size_in_bytes
        kind = (
            self.dtype.to_numpy()
            if self.dtype
            not in (DType.bfloat16, DType.float8_e4m3fn, DType.float8_e5m2)
            else np.dtype(f"u{width}")
        )
        place = slice(self.offset, self.offset + self.num_bytes)
        if self.mapped is None and self.num_bytes < _SMALL:
            array = np.fromfile(self.file, np.uint8, self.num_bytes, offset=self.offset)
        else:
            whole = mapped_bytes(self.file) if self.mapped is None else self.mapped
            array = whole[place]
        array = array.view(kind)
        if not array.flags.aligned:
            array = array.copy()
        array.flags.writeable = False
        return array.reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, without reading them.

    Raises:
        ModelLoadError: The file cannot be read, is shorter than its header says, or has
            no header.
    """
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, StoredTensor], Mapping[str, str]]:
    """:func:`read_header`, and what the writer of the file says of it, by key."""
    where = short_name(path)
    check_file(path)
    with path.open("rb") as file:
        stamp = FileStamp.of(path, file)
        size = stamp.size
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        start = _HEADER_BYTES + length
        if size < _HEADER_BYTES or start > size:
            raise ModelLoadError(
                f"{where}: the header should end at byte {start}, the file at "
                f"{size}; it is truncated or no safetensors file: download it again"
            )
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = header.items()
        except (ValueError, AttributeError, RecursionError) as err:
            raise ModelLoadError(
                f"{where}: the header is no JSON object; the file is damaged: "
                "download it again"
            ) from err
    tensors = {
        name: _tensor(stamp, name, entry, start)
        for name, entry in entries
        if name != "__metadata__"
    }
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end and tensor.num_bytes:
            what = "overlaps" if tensor.offset < end else "leaves a gap to"
            raise ModelLoadError(
                f"{where}: {shown(name)} {what} the tensor before it; the file is "
                "damaged: download it again"
            )
        end += tensor.num_bytes
    if size > end:
        raise ModelLoadError(
            f"{where}: {end} bytes expected from its header, got {size}; the "
            "file is damaged: download it again"
        )
    if size < end:
        raise ModelLoadError(
            f"{where}: {end} bytes expected from its header, got {size}; the "
            "file is truncated: download it again"
        )
    told = header.get("__metadata__")
    told = told if isinstance(told, dict) else {}
    return tensors, {str(key): str(value) for key, value in told.items()}


def _tensor(
    stamp: FileStamp, name: str, entry: Mapping[str, Any], start: int
) -> StoredTensor:
    path = stamp.path
    where = short_name(path)
    try:
        first, last = entry["data_offsets"]
        shape, code = tuple(entry["shape"]), shown(str(entry["dtype"]))
        if min(operator.index(size) for size in (first, last - first, *shape)) < 0:
            raise ValueError("negative")
    except (KeyError, TypeError, ValueError) as err:
        raise ModelLoadError(
            f"{where}: the header's entry for {shown(name)} is malformed; download "
            "the file again"
        ) from err
    dtype = _DTYPES.get(code)
    if dtype is not None and last - first != math.prod(shape) * dtype.size_in_bytes:
        raise ModelLoadError(
            f"{where}: {shown(name)} of shape {shape} and dtype {code} cannot "
            f"take {last - first} bytes; the file is damaged: download it again"
        )
    size = last - first
    place = start + first
    return StoredTensor(shape, dtype, name, path, size, code, place, stamp=stamp)
