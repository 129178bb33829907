"""One GGUF file: its header, checked against its size, and tensors dequantised lazily.

Numbers are those of ``gguf.quants.dequantize``, to the bit. A tensor of blocks is made
a few blocks at a time, so that little more than the result lies in memory.

References:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, NoReturn, final

import numpy as np
from max.dtype import DType

from ..errors import ModelLoadError
from .reading import FileStamp, check_file, mapped_bytes, short_name, shown
from .safetensors_file import StoredTensor
from .tensors import AbstractStoredTensor, AbstractTensor, part_of_whole

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_AXES: Final = 4
_ALIGNMENT: Final = 32
# Elements dequantised at once: bounds what numpy holds meanwhile to some 8 MiB.
_CHUNK: Final = 1 << 18
_PLAIN: Final = MappingProxyType(
    {"F32": DType.float32, "F16": DType.float16, "BF16": DType.bfloat16}
)
_BLOCKS: Final = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
# Of the header's values: struct's letters by the format's numbers.
_NUMBERS: Final = "BbHhIifB"
_STRING, _ARRAY = 8, 9
_WIDE: Final = MappingProxyType({10: "Q", 11: "q", 12: "d"})
# Kept of the header: words, numbers and short lists, such as a shape.
_MAX_KEPT: Final = 8
_SHAPE: Final = "comfy.gguf.orig_shape."

Value = str | int | float | tuple["Value", ...] | None


@final
@dataclass(frozen=True, eq=False)
class BlockTensor(AbstractStoredTensor):
    """Numbers in quantised blocks, which follow each other along the rows."""

    offset: int
    """Bytes from the start of the file."""
    block: int
    """Numbers in a block."""
    block_bytes: int
    quantisation: int
    """The package's number of it."""

    def read(self) -> np.ndarray:
        """All numbers, float32."""
        return self._numbers(0, math.prod(self.shape)).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop - 1``, float32; whole blocks."""
        width = self._row
        shape = (stop - start, *self.shape[1:])
        return self._numbers(start * width, stop * width).reshape(shape)

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        if axis or self._row % self.block:
            return part_of_whole(self, axis, start, stop)
        return BlockRows((stop - start, *self.shape[1:]), self.dtype, self, start)

    @property
    def _row(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape[1:])

    def _numbers(self, start: int, stop: int) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(self.quantisation)
        first, last = start // self.block, stop // self.block
        count = (last - first) * self.block_bytes
        place = self.offset + first * self.block_bytes
        stored = mapped_bytes(self.file)[place : place + count]
        found = np.empty(stop - start, np.float32)
        step = max(1, _CHUNK // self.block)
        for index in range(0, last - first, step):
            # One row of them, whatever the shape: each block stands for itself.
            part = stored[index * self.block_bytes : (index + step) * self.block_bytes]
            numbers = dequantize(part.reshape(1, -1), kind).reshape(-1)
            found[index * self.block : index * self.block + numbers.size] = numbers
        return found


@final
@dataclass(frozen=True, eq=False)
class BlockRows(AbstractTensor):
    """Some rows of a tensor in blocks; no others are dequantised."""

    whole: BlockTensor
    start: int

    @property
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """The whole."""
        return (self.whole,)

    def read(self) -> np.ndarray:
        """The rows, float32."""
        return self.whole.read_rows(self.start, self.start + self.shape[0])

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        if axis:
            return part_of_whole(self, axis, start, stop)
        shape = (stop - start, *self.shape[1:])
        return BlockRows(shape, self.dtype, self.whole, self.start + start)


@final
@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    values: Mapping[str, Value]
    """By key; ``None`` in place of what is long, such as a vocabulary."""
    tensors: Mapping[str, AbstractStoredTensor]
    """By name; not read."""


def read_gguf(path: Path) -> GgufHeader:
    """Reads a file's header, and no tensor.

    Raises:
        ModelLoadError: The file cannot be read, is damaged or truncated, or holds
            tensors of a quantisation that is not known here.
    """
    check_file(path)
    with path.open("rb") as file:
        return _Reader(path, file).header()


class _Reader:
    """Goes through a header once."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._stamp = FileStamp.of(path, file)
        self._size = self._stamp.size

    def header(self) -> GgufHeader:
        magic, version = self._take(4), self._number("I")
        if magic != MAGIC or version not in _VERSIONS:
            raise ModelLoadError(
                f"{short_name(self._path)}: expected GGUF of version 2 or 3, little "
                f"endian, got version {version}; convert the model again"
            )
        num_tensors, num_values = self._number("Q"), self._number("Q")
        values: dict[str, Value] = {}
        for _ in range(num_values):
            key = self._text()
            if key in values:
                self._damaged(f"its header says {shown(key)} twice")
            values[key] = self._value(self._number("I"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name, axes = self._text(), self._number("I")
            if name in infos:
                self._damaged(f"the tensor {shown(name)} is there twice")
            if axes > _MAX_AXES:
                self._damaged(f"{shown(name)} has {axes} axes of at most {_MAX_AXES}")
            # The fastest axis comes first.
            shape = tuple(self._number("Q") for _ in range(axes))[::-1]
            infos[name] = (shape, self._number("I"), self._number("Q"))
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            self._damaged(f"general.alignment is {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        tensors = {
            name: self._tensor(name, *info, start, values)
            for name, info in infos.items()
        }
        self._check_places(tensors.values())
        return GgufHeader(MappingProxyType(values), MappingProxyType(tensors))

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        quantisation: int,
        offset: int,
        start: int,
        values: Mapping[str, Value],
    ) -> BlockTensor | StoredTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        kinds = {kind.value: kind.name for kind in GGMLQuantizationType}
        code = kinds.get(quantisation, str(quantisation))
        if code not in _PLAIN and code not in _BLOCKS:
            raise ModelLoadError(
                f"{short_name(self._path)}: {shown(name)} is of quantisation {code}; "
                f"those that are read are {', '.join((*_PLAIN, *_BLOCKS))}: take a "
                "file of one of these"
            )
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[code]]
        count = math.prod(shape)
        if (shape[-1] if shape else 1) % block:
            self._damaged(
                f"{shown(name)} of shape {shape} is no multiple of {code}'s blocks"
            )
        known = values.get(_SHAPE + name)
        if known is not None:
            # Flattened by the writer where a row was no multiple of a block.
            sizes = known if isinstance(known, tuple) else (known,)
            if math.prod(s if isinstance(s, int) else 0 for s in sizes) != count:
                self._damaged(
                    f"{shown(name)} of shape {shape} cannot have been {sizes}"
                )
            shape = tuple(int(size) for size in sizes if isinstance(size, int))
        size = count // block * block_bytes
        place = start + offset
        if code in _PLAIN:
            dtype = _PLAIN[code]
            return StoredTensor(
                *(shape, dtype, name, self._path, size, code, place),
                stamp=self._stamp,
            )
        return BlockTensor(
            *(shape, DType.float32, name, self._path, size, code, place),
            *(block, block_bytes, quantisation),
            stamp=self._stamp,
        )

    def _check_places(self, tensors: Iterable[BlockTensor | StoredTensor]) -> None:
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                self._damaged(f"{shown(tensor.name)} overlaps the tensor before it")
            end = tensor.offset + tensor.num_bytes
        if end > self._size:
            raise ModelLoadError(
                f"{short_name(self._path)}: {end} bytes expected from its header, got "
                f"{self._size}; the file is truncated: download it again"
            )

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            item, count = self._number("I"), self._number("Q")
            if item == _ARRAY:
                self._damaged("a list of its header holds lists")
            if count <= _MAX_KEPT:
                return tuple(self._value(item) for _ in range(count))
            if item == _STRING:
                for _ in range(count):
                    self._text()
            else:
                self._skip(count * struct.calcsize(self._letter(item)))
            return None
        found: int | float = self._any_number(self._letter(kind))
        return found

    def _letter(self, kind: int) -> str:
        if kind < len(_NUMBERS):
            return _NUMBERS[kind]
        if kind not in _WIDE:
            self._damaged(f"a value of its header is of the unknown kind {kind}")
        return _WIDE[kind]

    def _text(self) -> str:
        try:
            return self._take(self._number("Q")).decode()
        except UnicodeDecodeError as err:
            self._damaged("a name in its header is no UTF-8", err)

    def _number(self, letter: str) -> int:
        return int(self._any_number(letter))

    def _any_number(self, letter: str) -> int | float:
        size = struct.calcsize(letter)
        found: int | float = struct.unpack(f"<{letter}", self._take(size))[0]
        return found

    def _take(self, count: int) -> bytes:
        # A damaged length must not be allocated.
        left = self._size - self._file.tell()
        if count > left:
            raise ModelLoadError(
                f"{short_name(self._path)}: its header goes on after its last byte; "
                "the file is truncated or damaged: download it again"
            )
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._take(0 if count <= self._size - self._file.tell() else count)
        self._file.seek(count, os.SEEK_CUR)

    def _damaged(self, problem: str, err: Exception | None = None) -> NoReturn:
        raise ModelLoadError(
            f"{short_name(self._path)}: {problem}; the file is damaged: download it "
            "again"
        ) from err
