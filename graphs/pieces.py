"""What transformer blocks are made of, in pieces that a CPU runs as one operation each.

A block is written once. Where its scope has products (:attr:`WeightScope.products`),
each piece is an operation of :mod:`graphs.processor` on packed matrices, norm and
modulation fused before it, activation, gate and residual after it; elsewhere it is
MAX's own operations. What is not read is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, final

from max.dtype import DType
from max.graph import Dim, TensorValue, ops

from . import processor
from .layers import (
    filled,
    layer_norm,
    linear,
    rms_norm,
)
from .processor import Activation, Columns, Gate, RowNorm
from .weights import WeightScope


@final
@dataclass(frozen=True)
class Modulation:
    """Shifts, scales and gates that a block takes from the condition of its step."""

    vectors: TensorValue
    """``(B, columns)``."""
    width: int
    start: int
    """Column of the first vector."""
    count: int

    @cached_property
    def parts(self) -> Sequence[TensorValue]:
        """The vectors, each ``(B, 1, D)``."""
        vectors, size = self.vectors, self.count * self.width
        if int(vectors.shape[1]) != size:
            vectors = vectors[:, self.start : self.start + size]
        y = ops.unsqueeze(vectors, 1)
        return ops.split(y, [self.width] * self.count, axis=2)

    def column(self, index: int) -> int:
        """Where a vector begins."""
        return self.start + index * self.width


def modulations(
    w: WeightScope,
    names: Sequence[str],
    condition: TensorValue,
    width: int,
    count: int,
    *,
    bias: bool = True,
) -> list[Modulation]:
    """Computes ``count`` vectors of each of some linear layers of the condition.

    ``condition`` is ``(B, channels)``, each vector ``(B, width)``.
    """
    sizes, channels = [count * width] * len(names), int(condition.shape[1])
    if w.products is None:
        vectors = [
            linear(w / name, condition, channels, count * width, bias=bias)
            for name in names
        ]
        return [Modulation(each, width, 0, count) for each in vectors]
    layers = [Layer(name, size) for name, size in zip(names, sizes, strict=True)]
    joined = project(w, layers, condition, channels, bias=bias, dtype=DType.float32)
    return [Modulation(each.tensor, width, each.first, count) for each in joined]


@final
@dataclass(frozen=True)
class ModulatedNorm:
    """The layer norm of hidden states, times 1 + scale, plus shift."""

    x: TensorValue
    """``(B, S, D)``."""
    modulation: Modulation
    shift: int = 0
    """Which vector of the modulation it is."""
    scale: int = 1
    epsilon: float = 1e-6

    @cached_property
    def tensor(self) -> TensorValue:
        """Computed by itself, ``(B, S, D)``."""
        parts = self.modulation.parts
        x = self.x.cast(self.modulation.vectors.dtype)
        y = layer_norm(x, self.modulation.width, epsilon=self.epsilon)
        y = y * (1 + parts[self.scale])
        return (y + parts[self.shift]).cast(self.x.dtype)

    @property
    def norm(self) -> RowNorm:
        """As what a linear layer does before its product."""
        return RowNorm(
            "layer",
            self.modulation.vectors,
            self.modulation.column(self.scale),
            self.modulation.column(self.shift),
            offset=1.0,
            epsilon=self.epsilon,
        )


@final
@dataclass(frozen=True)
class AffineNorm:
    """The layer or RMS norm of hidden states, with weights of its own."""

    w: WeightScope
    x: TensorValue
    """``(..., D)``."""
    kind: Literal["layer", "rms"]
    epsilon: float = 1e-6

    @cached_property
    def tensor(self) -> TensorValue:
        """Computed by itself, like ``x``."""
        width = int(self.x.shape[-1])
        if self.kind == "rms":
            return rms_norm(self.w, self.x, width, epsilon=self.epsilon)
        return layer_norm(self.x, width, self.w, epsilon=self.epsilon)

    @property
    def norm(self) -> RowNorm:
        """As what a linear layer does before its product."""
        width = int(self.x.shape[-1])
        names = ["weight"] if self.kind == "rms" else ["weight", "bias"]
        joined = self.w.joined(names, *[width] * len(names))
        vectors = ops.reshape(joined, (1, len(names) * width))
        shift = None if self.kind == "rms" else width
        return RowNorm(self.kind, vectors, 0, shift, offset=0.0, epsilon=self.epsilon)


@final
@dataclass(frozen=True)
class ScaledNorm:
    """The layer or RMS norm of hidden states, times a vector of each sample."""

    x: TensorValue
    """``(B, S, D)``."""
    factors: TensorValue
    """float32 ``(B, D)``: weights and scales, in one."""
    kind: Literal["layer", "rms"]
    epsilon: float = 1e-6

    @cached_property
    def tensor(self) -> TensorValue:
        """Computed by itself, like ``x``."""
        width = int(self.x.shape[-1])
        x = self.x.cast(DType.float32)
        if self.kind == "rms":
            y = ops.rms_norm(x, filled(1.0, (width,), x.device), self.epsilon)
        else:
            y = layer_norm(x, width, epsilon=self.epsilon)
        return (y * ops.unsqueeze(self.factors, 1)).cast(self.x.dtype)

    @property
    def norm(self) -> RowNorm:
        """As what a linear layer does before its product."""
        return RowNorm(
            self.kind, self.factors, 0, None, offset=0.0, epsilon=self.epsilon
        )


Normed: TypeAlias = ModulatedNorm | AffineNorm | ScaledNorm


@final
@dataclass(frozen=True)
class Layer:
    """A linear layer: its name in the scope, its features, what becomes of them."""

    name: str
    features: int
    activation: Activation = ""


def project(
    w: WeightScope,
    layers: Sequence[Layer],
    x: TensorValue | Normed,
    in_features: int,
    *,
    first: int = 0,
    bias: bool = True,
    dtype: DType | None = None,
) -> list[Columns]:
    """Several linear layers of the same input.

    Args:
        w: Scope of the layers.
        layers: Those with an activation last, which is the same for all of them.
        x: ``(..., in_features)``.
        in_features: Columns of ``x``.
        first: The first layer that is computed; those before are only packed with it,
            as another graph has them.
        bias: Whether they have one.
        dtype: Of the results; the scope's by default.

    Returns:
        Of each layer from ``first`` on ``(..., features)``.
    """
    wanted = layers[first:]
    if w.products is None:
        plain = x if isinstance(x, TensorValue) else x.tensor
        found = [
            linear(
                w / each.name,
                plain,
                in_features,
                each.features,
                bias=bias,
                activation=each.activation,
                dtype=dtype,
            )
            for each in wanted
        ]
        return [Columns.all_of(each) for each in found]
    sizes = [each.features for each in layers]
    names = [each.name for each in layers]
    matrix = w.packed([f"{name}.weight" for name in names], sizes, in_features)
    active = [each.activation for each in wanted]
    kinds = set(active) - {""}
    assert len(kinds) < 2 and active == sorted(active), "those with an activation last"
    y = processor.linear(
        Columns.all_of(x if isinstance(x, TensorValue) else x.x),
        matrix,
        sum(each.features for each in wanted),
        bias=w.joined([f"{name}.bias" for name in names], *sizes) if bias else None,
        first=sum(sizes[:first]),
        norm=None if isinstance(x, TensorValue) else x.norm,
        activation=kinds.pop() if kinds else "",
        activated_from=sum(each.features for each in wanted if not each.activation),
        dtype=dtype or w.dtype,
    )
    starts = [sum(sizes[first : first + i]) for i in range(len(wanted))]
    return [
        Columns(y, start, each.features)
        for start, each in zip(starts, wanted, strict=True)
    ]


@final
class Product:
    """A linear layer whose output a block adds to a stream.

    Args:
        w: Scope of the layer.
        inputs: One, or two side by side.
        features: Columns of the output.
        bias: Whether the layer has one.
    """

    def __init__(
        self,
        w: WeightScope,
        inputs: Sequence[Columns],
        features: int,
        *,
        bias: bool = True,
    ) -> None:
        self.w, self.inputs, self.features, self._bias = w, inputs, features, bias
        # Asked for twice, they are still one operation.
        self._output: TensorValue | None = None
        self._sum: TensorValue | None = None

    @property
    def tensor(self) -> TensorValue:
        """The output by itself, ``(B, S, features)``."""
        if self._output is None:
            is_plain = self.w.products is None
            self._output = self._plain() if is_plain else self._fused(None)
        return self._output

    def added(
        self, residual: TensorValue, modulation: Modulation, index: int
    ) -> TensorValue:
        """Adds the output to its stream through a gate of the modulation.

        A block has one place for each output.
        """
        if self.w.products is None or self._output is not None:
            return gated(residual, modulation, index, self.tensor)
        if self._sum is None:
            gate = Gate(modulation.vectors, modulation.column(index), residual)
            self._sum = self._fused(gate)
        return self._sum

    def _fused(self, gate: Gate | None) -> TensorValue:
        total = sum(each.size for each in self.inputs)
        first, *others = self.inputs
        return processor.linear(
            first,
            self.w.packed(["weight"], [self.features], total),
            self.features,
            bias=self.w.joined(["bias"], self.features) if self._bias else None,
            beside=others[0] if others else None,
            gate=gate,
        )

    def _plain(self) -> TensorValue:
        total = sum(each.size for each in self.inputs)
        if len(self.inputs) == 1:
            x = self.inputs[0].tensor
            return linear(self.w, x, total, self.features, bias=self._bias)
        # One matrix in the checkpoint, two here: joining inputs along the channels
        # copies both.
        start = 0
        y = self.w("bias", self.features) if self._bias else None
        for each in self.inputs:
            stop = start + each.size
            part = self.w.columns("weight", self.features, total, start, stop)
            product = each.tensor @ ops.transpose(part, 0, 1)
            y = product if y is None else product + y
            start = stop
        assert y is not None, "there is an input"
        return y


Given: TypeAlias = TensorValue | Product
"""What a block adds to a stream: given to the graph, or to be computed."""


def computed(value: Given) -> TensorValue:
    """The value itself, which is computed for its own sake."""
    return value.tensor if isinstance(value, Product) else value


def gated(
    residual: TensorValue, modulation: Modulation, index: int, y: Given
) -> TensorValue:
    """Adds a value to a stream through a gate of the modulation."""
    if isinstance(y, Product):
        return y.added(residual, modulation, index)
    gate = modulation.parts[index]
    return (residual.cast(gate.dtype) + gate * y.cast(gate.dtype)).cast(y.dtype)


def cut(x: TensorValue, first: Dim) -> tuple[TensorValue, TensorValue]:
    """Splits ``(B, S, D)`` into the first tokens and the others."""
    # By their sizes: bounds that are tensors would each be compiled to be folded.
    return x[:, :first, :], x[:, first:, :]
