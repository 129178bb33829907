"""Named weight slots: what a graph asks of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops

from .processor import packed_filter_shape, packed_shape


@dataclass(frozen=True)
class WeightSpec:
    """Shape and dtype a graph expects of one checkpoint tensor."""

    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True)
class WeightSlot:
    """What one slot of a graph is filled with: checkpoint tensors, or a part of one."""

    tensor: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Of what fills the slot."""
    dtype: DType
    columns: tuple[int, int] | None = None
    """First and last + 1 of the second axis, of a matrix; ``None`` for everything."""
    others: tuple[str, ...] = ()
    """Tensors that follow the first one, joined to it along the first axis."""
    is_packed: bool = False
    """Whether the matrix is laid out for products on a CPU, see
    :func:`graphs.processor.packed_shape`."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors in it."""
        return (self.tensor, *self.others)

    @property
    def key(self) -> str:
        """Its name in the registry, without the component's."""
        name = "+".join(self.tensors)
        if self.columns is not None:
            name = "{}.columns_{}_{}".format(name, *self.columns)
        return f"{name}.packed" if self.is_packed else name


@dataclass(frozen=True)
class WeightNeeds:
    """What the graphs of a module ask of one component's checkpoint."""

    prefix: str = ""
    """Registry prefix: the component's name."""
    specs: Mapping[str, WeightSpec] = field(default_factory=dict)
    """Every checkpoint tensor, by its name."""
    slots: Mapping[str, WeightSlot] = field(default_factory=dict)
    """Every slot, by its registry name without the prefix."""

    @property
    def named_slots(self) -> dict[str, WeightSlot]:
        """The slots by their whole registry names."""
        return {f"{self.prefix}.{key}": slot for key, slot in self.slots.items()}

    def __or__(self, other: WeightNeeds) -> WeightNeeds:
        """What both ask of the same component."""
        return WeightNeeds(
            self.prefix, {**self.specs, **other.specs}, {**self.slots, **other.slots}
        )


class TooManyWeights(Exception):
    """Graphs ask for more weights than their scope allows."""


@dataclass
class _Record:
    """Slots requested so far, shared by a scope and its children."""

    limit: int | None
    specs: dict[str, WeightSpec] = field(default_factory=dict)
    slots: dict[str, WeightSlot] = field(default_factory=dict)
    values: dict[tuple[Graph, str], TensorValue] = field(default_factory=dict)
    functions: dict[tuple[Graph, str, tuple[TensorType, ...]], Graph] = field(
        default_factory=dict
    )


@final
class WeightScope:
    """Hands out weight slots under a prefix and remembers every request.

    Slots are external constants: the values come in at ``init``, are no part of the
    compile-cache key, and equal names in several graphs of one module share one
    buffer, on the device the graph runs on. (``max.graph.Weight`` would give each
    graph its own device copy.)

    Names are the checkpoint's own, so ``specs`` says exactly what a file must hold.

    Args:
        prefix: Registry prefix of the component, for example ``transformer``.
        dtype: Default dtype of the slots.
        device: Where the graph runs.
        limit: Most checkpoint tensors that may be asked for. A configuration with a
            billion layers then ends at once, not when memory does.
        products: Dtype of packed matrices for the operations of
            :mod:`graphs.processor`; ``None`` to build MAX's own operations.
    """

    def __init__(
        self,
        prefix: str,
        dtype: DType,
        device: DeviceRef,
        limit: int | None = None,
        *,
        products: DType | None = None,
        _path: str = "",
        _record: _Record | None = None,
    ) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.device = device
        self.products = products
        self._path = _path
        self._record = _record if _record is not None else _Record(limit)

    def __truediv__(self, name: str | int) -> WeightScope:
        """The scope one level down: ``scope / "attn" / 0`` is ``attn.0.``."""
        return WeightScope(
            self.prefix,
            self.dtype,
            self.device,
            products=self.products,
            _path=f"{self._path}{name}.",
            _record=self._record,
        )

    def __call__(
        self, name: str, *shape: int, dtype: DType | None = None
    ) -> TensorValue:
        """The slot ``name`` of this scope, of ``shape``, in the current graph."""
        spec = self._require(name, WeightSpec(shape, dtype or self.dtype))
        return self._value(WeightSlot(self._path + name, spec.shape, spec.dtype))

    def columns(
        self, name: str, rows: int, columns: int, start: int, stop: int
    ) -> TensorValue:
        """Columns ``start`` to ``stop`` of a weight ``(rows, columns)``, as a slot.

        Cut when the weights are loaded: a slice in the graph would be folded into a
        second copy on the device.
        """
        self._require(name, WeightSpec((rows, columns), self.dtype))
        shape = rows, stop - start
        tensor = self._path + name
        return self._value(WeightSlot(tensor, shape, self.dtype, (start, stop)))

    def joined(self, names: Sequence[str], *size: int) -> TensorValue:
        """Vectors of ``size`` elements each, one after the other, as float32."""
        for name, each in zip(names, size, strict=True):
            self._require(name, WeightSpec((each,), self.dtype))
        first, *others = (self._path + name for name in names)
        slot = WeightSlot(first, (sum(size),), DType.float32, others=tuple(others))
        return self._value(slot)

    def packed(
        self, names: Sequence[str], rows: Sequence[int], columns: int
    ) -> TensorValue:
        """Matrices ``(rows, columns)``, one below the other, for products on a CPU."""
        for name, each in zip(names, rows, strict=True):
            self._require(name, WeightSpec((each, columns), self.dtype))
        first, *others = (self._path + name for name in names)
        assert self.products is not None, "a scope of plain operations packs nothing"
        shape = packed_shape(sum(rows), columns, self.products)
        slot = WeightSlot(
            first, shape, self.products, others=tuple(others), is_packed=True
        )
        return self._value(slot)

    def packed_filter(
        self, name: str, channels: int, inputs: int, kernel: int
    ) -> TensorValue:
        """A filter ``(channels, inputs, kernel, kernel)`` for products on a CPU."""
        shape = channels, inputs, kernel, kernel
        self._require(name, WeightSpec(shape, self.dtype))
        assert self.products is not None, "a scope of plain operations packs nothing"
        packed = packed_filter_shape(channels, inputs, kernel, self.products)
        return self._value(
            WeightSlot(self._path + name, packed, self.products, is_packed=True)
        )

    def _require(self, name: str, spec: WeightSpec) -> WeightSpec:
        key = self._path + name
        specs, limit = self._record.specs, self._record.limit
        if limit is not None and len(specs) >= limit and key not in specs:
            raise TooManyWeights(f"{self.prefix}: more than {limit:,} weights")
        known = specs.setdefault(key, spec)
        assert known == spec, f"{self.prefix}: {key} asked for as {known} and {spec}"
        return spec

    def _value(self, slot: WeightSlot) -> TensorValue:
        key = slot.key
        known = self._record.slots.setdefault(key, slot)
        assert known == slot, f"{self.prefix}: {key} asked for as {known} and {slot}"
        # Asked for twice in one graph, a slot is still one constant.
        place = (Graph.current, key)
        if place not in self._record.values:
            self._record.values[place] = ops.constant_external(
                f"{self.prefix}.{key}", TensorType(slot.dtype, slot.shape, self.device)
            )
        return self._record.values[place]

    def call(
        self,
        name: str,
        inputs: Sequence[TensorValue],
        body: Callable[..., TensorValue],
    ) -> TensorValue:
        """``body(*inputs)``, compiled once for all calls of equal name and types.

        What a function is given and something else reads, too, must be an input of the
        graph, a weight, or another function's result: of anything else, MAX 26.7 gives
        the memory away while it is still to be read.

        Args:
            name: What the body does, all of its parameters included.
            inputs: Its inputs; their dimensions must be plain, not expressions.
            body: Builds the nodes of one output; reads nothing else of the graph.
        """
        graph = Graph.current
        types = tuple(value.type for value in inputs)
        functions = self._record.functions
        if (graph, name, types) not in functions:
            # A symbol of the whole module, so it must not meet another graph's.
            symbol = f"{graph.name}_{name}_{len(functions)}"
            with graph.add_subgraph(
                symbol, input_types=types, devices=[self.device]
            ) as function:
                function.output(body(*(value.tensor for value in function.inputs)))
            functions[graph, name, types] = function
        return ops.call(functions[graph, name, types], *inputs)[0].tensor

    @property
    def needs(self) -> WeightNeeds:
        """Everything asked for so far."""
        return WeightNeeds(
            self.prefix, dict(self._record.specs), dict(self._record.slots)
        )
