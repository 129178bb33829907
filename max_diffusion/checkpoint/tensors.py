"""Tensors that are read when they are asked for, and what they are made of.

A stored tensor lies in a file. All others are parts, joins or results of such, know
their shape and dtype without reading, and keep nothing of what they read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np
from max.dtype import DType

from ..errors import ModelLoadError
from .reading import FileStamp, shown


class TensorError(ModelLoadError):
    """A tensor cannot be made of what is stored.

    Args:
        message: One line.
        stored: What there is of it.
    """

    def __init__(self, message: str, stored: Sequence[AbstractStoredTensor]) -> None:
        super().__init__(message)
        self.stored = tuple(stored)

    def __reduce__(self) -> tuple[type[ModelLoadError], tuple[str]]:
        # Tensors do not travel to another process.
        return ModelLoadError, (str(self),)


@final
class MissingTensors(TensorError):
    """Files lack what a tensor is made of.

    Args:
        names: What is missing, by its names in the files.
        stored: What is there of it.
    """

    def __init__(
        self, names: Sequence[str], stored: Sequence[AbstractStoredTensor] = ()
    ) -> None:
        message = f"weights: {', '.join(names)} expected in the files, not there; "
        super().__init__(message + "download the model again", stored)
        self.names = tuple(names)


@final
class UnfitTensor(TensorError):
    """Shapes do not allow what is to be made of tensors.

    Args:
        problem: What was expected.
        tensors: Of what.
    """

    def __init__(self, problem: str, *tensors: AbstractTensor) -> None:
        stored = made_of(*tensors)
        super().__init__(f"{_listed(stored)} {problem}", stored)


@final
class NonFiniteTensor(TensorError):
    """Tensors hold NaN or infinity, or do so once they are cast or merged."""


@dataclass(frozen=True, eq=False)
class AbstractTensor(ABC):
    """Shape and dtype of a tensor, and how it is read."""

    shape: tuple[int, ...]
    dtype: DType | None
    """Of what is read; ``None`` if it is one that is not known here."""

    @property
    @abstractmethod
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """What of the files it is made of."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """The contents, not to be written to; bfloat16 and float8 as unsigned bits.

        Mapped where they lie in the file as they are asked for, and else made anew with
        every call.
        """

    @abstractmethod
    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        """:meth:`sliced`, of what is there; computes no more than the part if it can.

        A fused matrix that is computed would else be computed for each of its parts.
        """

    @final
    def sliced(self, axis: int, start: int, stop: int) -> AbstractTensor:
        """Elements ``start`` to ``stop - 1`` of an axis.

        Raises:
            UnfitTensor: There are none such.
        """
        if axis >= len(self.shape) or not 0 <= start <= stop <= self.shape[axis]:
            raise UnfitTensor(
                f"has no elements {start} to {stop - 1} along axis {axis}", self
            )
        return self._part(axis, start, stop)

    @final
    def split(self, *shares: int, axis: int = 0) -> tuple[AbstractTensor, ...]:
        """Parts of an axis in the proportion of ``shares``, together all of it.

        ``split(1, 1, 1)`` gives query, key and value of one matrix.

        Raises:
            UnfitTensor: The axis cannot be divided so.
        """
        size = self.shape[axis] if axis < len(self.shape) else 0
        unit, rest = divmod(size, sum(shares))
        if rest or not unit:
            ratio = ":".join(map(str, shares))
            raise UnfitTensor(f"cannot be split {ratio} along axis {axis}", self)
        stops = np.cumsum(shares).tolist()
        return tuple(
            self.sliced(axis, (stop - share) * unit, stop * unit)
            for stop, share in zip(stops, shares, strict=True)
        )

    @final
    def transposed(self, *axes: int) -> AbstractTensor:
        """The axes in another order; by default reversed.

        Raises:
            UnfitTensor: It has more or fewer axes.
        """
        order = axes or tuple(reversed(range(len(self.shape))))
        if sorted(order) != list(range(len(self.shape))):
            raise UnfitTensor(f"has no axes {order} to transpose", self)
        shape = tuple(self.shape[axis] for axis in order)
        return View(shape, self.dtype, self, lambda array: array.transpose(order))

    @final
    def reshaped(self, *shape: int) -> AbstractTensor:
        """The same elements in order, in another shape.

        Raises:
            UnfitTensor: There are more or fewer.
        """
        if math.prod(shape) != math.prod(self.shape):
            raise UnfitTensor(f"cannot be reshaped to {shape}", self)
        return View(shape, self.dtype, self, lambda array: array.reshape(shape))


@dataclass(frozen=True, eq=False)
class AbstractStoredTensor(AbstractTensor):
    """A tensor of a file."""

    name: str
    """In the file."""
    file: Path
    num_bytes: int
    """That it takes there."""
    code: str
    """The file's word for the dtype."""
    stamp: FileStamp | None = field(default=None, kw_only=True)
    """Of the file when its header was read; ``None`` if it is in memory."""

    @property
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """Itself."""
        return (self,)

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        return part_of_whole(self, axis, start, stop)


@final
@dataclass(frozen=True, eq=False)
class View(AbstractTensor):
    """The same numbers, or some of them, in another arrangement."""

    base: AbstractTensor
    take: Callable[[np.ndarray], np.ndarray]
    """From the whole's array, without changing it."""

    @property
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """As the base."""
        return self.base.stored

    def read(self) -> np.ndarray:
        """A view of what the base reads, where numpy can give one."""
        return self.take(self.base.read())

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        return part_of_whole(self, axis, start, stop)


@final
@dataclass(frozen=True, eq=False)
class Joined(AbstractTensor):
    """Several tensors one after the other along an axis."""

    parts: tuple[AbstractTensor, ...]
    axis: int

    @property
    def stored(self) -> tuple[AbstractStoredTensor, ...]:
        """What all parts are made of."""
        return made_of(*self.parts)

    def read(self) -> np.ndarray:
        """All parts, copied."""
        return np.concatenate([part.read() for part in self.parts], self.axis)

    def _part(self, axis: int, start: int, stop: int) -> AbstractTensor:
        return part_of_whole(self, axis, start, stop)


def joined(parts: Sequence[AbstractTensor], axis: int = 0) -> AbstractTensor:
    """Tensors of one dtype one after the other along an axis.

    Raises:
        UnfitTensor: They differ in dtype or along another axis.
    """
    first = parts[0]
    kinds = {(p.dtype, p.shape[:axis], p.shape[axis + 1 :]) for p in parts}
    if len(kinds) > 1 or axis >= len(first.shape):
        raise UnfitTensor(f"cannot be joined along axis {axis}", *parts)
    size = sum(part.shape[axis] for part in parts)
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    return Joined(shape, first.dtype, tuple(parts), axis)


def part_of_whole(
    tensor: AbstractTensor, axis: int, start: int, stop: int
) -> AbstractTensor:
    """Elements of an axis, of the whole that is read; without a copy of a file's."""
    places = (slice(None),) * axis + (slice(start, stop),)
    shape = (*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :])
    return View(shape, tensor.dtype, tensor, lambda array: array[places])


def made_of(*tensors: AbstractTensor) -> tuple[AbstractStoredTensor, ...]:
    """What of the files several tensors are made of, each once."""
    return tuple(dict.fromkeys(item for tensor in tensors for item in tensor.stored))


def origin(name: str, tensor: AbstractTensor) -> str:
    """Names and shapes in the files, for messages; empty if all that is the same."""
    stored = tensor.stored
    is_plain = stored == (tensor,) and stored[0].name == name
    return "" if is_plain else _listed(stored)


def _listed(stored: Sequence[AbstractStoredTensor]) -> str:
    return " and ".join(f"{shown(item.name)} {item.shape}" for item in stored)
