"""The split denoiser: one description of a transformer, every step graph from it.

A model writes ``condition``, ``embed``, ``block`` and ``output`` once. From these
:class:`StepGraphs` builds the graphs the caches need, so that a new model gets every
cache and a new cache every model. Their names begin with the component's, as in
``transformer.full``.

| step graph | computes | group |
|---|---|---|
| ``full`` | embed, all blocks, output | ``full`` |
| ``embed`` | hidden states and what all blocks read | ``blocks`` |
| ``block_i`` | block ``i`` | ``blocks`` |
| ``blocks_1_n`` | all blocks but the first | ``blocks`` |
| ``output`` | the prediction | ``blocks`` |
| ``modulated_input`` | what TeaCache compares | ``blocks`` |
| ``attention`` | ``full``, with what the attention of all blocks gave | ``attention`` |
| ``given_attention`` | ``full`` with such values given | ``attention`` |
| ``modules``, ``given_modules`` | the same of all their modules | ``modules`` |

Blocks are graphs of their own, so that which of them run is a request's choice and no
compile's: any first and last blocks. A call costs a quarter of a millisecond on a CPU,
which is nothing at FLUX.1's size and a third of a step at the demo model's; so what
most requests run of the blocks, all but the first, is one graph as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from max.dtype import DType
from max.graph import (
    AlgebraicDim,
    DeviceRef,
    Dim,
    Graph,
    Module,
    Shape,
    TensorType,
    TensorValue,
)

from .pieces import Given, computed
from .weights import WeightScope

ConditioningT = TypeVar("ConditioningT")
ModuleLevel = Literal["attention", "modules"]
"""Which module outputs are taken or given: those of attention, or all that a block adds
to its streams, the feed-forward layers' too."""


@dataclass(frozen=True)
class Streams:
    """Hidden states between two blocks."""

    image: TensorValue
    """Hidden states of the image tokens, ``(B, S_img, D)``."""
    text: TensorValue
    """Hidden states of the text tokens, ``(B, S_txt, D)``."""
    joint: TensorValue | None = None
    """Text then image as one sequence; ``None`` unless the last block left them so."""


class AbstractBlock(ABC):
    """One transformer block on given hidden states, in the pieces that caches replace.

    A whole block is ``add(outputs(attention()))``.
    """

    @abstractmethod
    def modulated_input(self) -> TensorValue:
        """Returns the normed and modulated ``(B, S, D)`` that attention reads."""

    @abstractmethod
    def attention(self) -> tuple[Given, ...]:
        """Returns the outputs of the attention, each ``(B, S, D)``."""

    @abstractmethod
    def outputs(self, attention: tuple[Any, ...]) -> tuple[Given, ...]:
        """Returns all that the block adds before gates, each ``(B, S, D)``.

        Args:
            attention: What :meth:`attention` returned, or tensors in its place.
        """

    @abstractmethod
    def add(self, outputs: tuple[Any, ...]) -> Streams:
        """Adds the outputs to the streams, through gates of the present step.

        Args:
            outputs: What :meth:`outputs` returned, or tensors in its place.
        """

    def run(self) -> Streams:
        """Runs the whole block and returns the streams after it."""
        return self.add(self.outputs(self.attention()))


class AbstractDenoiser(ABC, Generic[ConditioningT]):
    """Describes a transformer in pieces; every call adds nodes to the open graph."""

    num_blocks: int
    width: int
    dtype: DType
    device: DeviceRef
    block_inputs: tuple[str, ...] = ()
    """Names of the inputs that blocks and output read themselves, beside the
    condition."""

    @abstractmethod
    def input_types(
        self,
        batch: int | str = "batch",
        image_seq_len: int | str = "image_seq_len",
        text_seq_len: int | str = "text_seq_len",
    ) -> dict[str, TensorType]:
        """Returns a step's inputs by name, in graph order, ``latents`` first."""

    @abstractmethod
    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue, ...]:
        """Computes what all blocks of a step share, from time and guidance, say."""

    @abstractmethod
    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> ConditioningT:
        """Returns what blocks read, of the condition and :attr:`block_inputs`."""

    @abstractmethod
    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Turns the inputs into the hidden states before the first block."""

    @abstractmethod
    def block(
        self, w: WeightScope, index: int, streams: Streams, conditioning: ConditioningT
    ) -> AbstractBlock:
        """Creates the transformer block ``index`` on these hidden states."""

    @abstractmethod
    def output(
        self, w: WeightScope, image: TensorValue, conditioning: ConditioningT
    ) -> TensorValue:
        """Turns the image stream into the prediction ``(B, S_img, C)``."""


class StepGraphs(Generic[ConditioningT]):
    """Adds the step graphs of one denoiser to a module.

    Args:
        module: Module that receives the graphs.
        denoiser: The transformer.
        w: Its weights.
        sizes: ``(B, S_img, S_txt)`` of the graphs of single blocks, symbolic unless
            their shapes are to be looked at.
    """

    def __init__(
        self,
        module: Module,
        denoiser: AbstractDenoiser[ConditioningT],
        w: WeightScope,
        sizes: Sequence[int | str] = ("batch", "image_seq_len", "text_seq_len"),
    ) -> None:
        self._module, self._denoiser, self._w = module, denoiser, w
        self._sizes = tuple(sizes)
        self._types = denoiser.input_types(*self._sizes)
        # From a graph that nobody compiles: what a block is given of the condition.
        types = self._types.values()
        with Graph("condition", input_types=types, module=Module()) as graph:
            condition = denoiser.condition(w, _named(self._types, graph))
            self._condition_types = [value.type for value in condition]

    def add_full(self) -> None:
        """Adds ``full``: ``inputs -> prediction``."""
        denoiser, w = self._denoiser, self._w
        with self._on_inputs("full") as (graph, inputs):
            streams, conditioning = self._start(inputs)
            for index in range(denoiser.num_blocks):
                streams = denoiser.block(w, index, streams, conditioning).run()
            graph.output(denoiser.output(w, streams.image, conditioning))

    def add_blocks(self) -> None:
        """Adds ``embed``, ``block_0`` ..., ``blocks_1_n``, ``output``, and more.

        ``embed``: ``inputs -> image, text, *condition``; ``block_i``: ``image, text,
        *condition, *block_inputs -> image, text``, and ``blocks_1_n``, of ``n`` blocks,
        the same; ``output``: the same inputs ``-> prediction``; ``modulated_input``:
        the same inputs ``-> (B, S, D)`` of block 0.
        """
        denoiser, w = self._denoiser, self._w
        count = denoiser.num_blocks
        with self._on_inputs("embed") as (graph, inputs):
            streams = denoiser.embed(w, inputs)
            graph.output(streams.image, streams.text, *denoiser.condition(w, inputs))
        spans = {f"block_{index}": range(index, index + 1) for index in range(count)}
        if count > 2:
            spans[f"blocks_1_{count}"] = range(1, count)
        for name, span in spans.items():
            with self._on_hidden(name) as (graph, streams, conditioning):
                for index in span:
                    streams = denoiser.block(w, index, streams, conditioning).run()
                graph.output(streams.image, streams.text)
        self.add_output()
        self.add_modulated_input()

    def add_modules(self, level: ModuleLevel) -> None:
        """Adds ``{level}`` and ``given_{level}``.

        ``{level}``: ``inputs -> prediction, *values`` with what the modules of all
        blocks gave, block by block, each ``(B, S, D)``; ``given_{level}``: ``inputs,
        *values -> prediction``.
        """
        denoiser, w = self._denoiser, self._w
        values: list[tuple[TensorValue, ...]] = []
        with self._on_inputs(level) as (graph, inputs):
            streams, conditioning = self._start(inputs)
            for index in range(denoiser.num_blocks):
                block = denoiser.block(w, index, streams, conditioning)
                # Computed for their own sake: as part of a sum they are nowhere.
                taken = tuple(map(computed, block.attention()))
                outputs = block.outputs(taken)
                if level == "modules":
                    outputs = taken = tuple(map(computed, outputs))
                values.append(taken)
                streams = block.add(outputs)
            prediction = denoiser.output(w, streams.image, conditioning)
            graph.output(prediction, *(value for taken in values for value in taken))
        # A function's inputs have plain sizes: a joint sequence's is bound inside.
        types = [
            TensorType(value.dtype, _plain(value.shape), w.device)
            for taken in values
            for value in taken
        ]
        with self._on_inputs(f"given_{level}", types) as (graph, inputs):
            extra = iter(graph.inputs[len(self._types) :])
            streams, conditioning = self._start(inputs)
            for index, taken in enumerate(values):
                given = tuple(next(extra).tensor.rebind(each.shape) for each in taken)
                block = denoiser.block(w, index, streams, conditioning)
                outputs = block.outputs(given) if level == "attention" else given
                streams = block.add(outputs)
            graph.output(denoiser.output(w, streams.image, conditioning))

    def module_shapes(self) -> dict[ModuleLevel, list[Shape]]:
        """Returns the shapes of what :meth:`add_modules` takes of all blocks.

        From one graph of the blocks, each on the same hidden states.
        """
        found: dict[ModuleLevel, list[Shape]] = {"attention": [], "modules": []}
        denoiser, w = self._denoiser, self._w
        with self._on_hidden("modules") as (_, streams, conditioning):
            for index in range(denoiser.num_blocks):
                block = denoiser.block(w, index, streams, conditioning)
                values = tuple(map(computed, block.attention()))
                outputs = map(computed, block.outputs(values))
                found["attention"] += [value.shape for value in values]
                found["modules"] += [value.shape for value in outputs]
        return found

    def add_output(self) -> Shape:
        """Adds ``output``, see :meth:`add_blocks`; returns the prediction's shape."""
        denoiser, w = self._denoiser, self._w
        with self._on_hidden("output") as (graph, streams, conditioning):
            value = denoiser.output(w, streams.image, conditioning)
            graph.output(value)
        return value.shape

    def add_modulated_input(self) -> Shape:
        """Adds ``modulated_input``, see :meth:`add_blocks`; returns its shape."""
        denoiser, w = self._denoiser, self._w
        with self._on_hidden("modulated_input") as (graph, streams, conditioning):
            value = denoiser.block(w, 0, streams, conditioning).modulated_input()
            graph.output(value)
        return value.shape

    def _start(self, inputs: dict[str, TensorValue]) -> tuple[Streams, ConditioningT]:
        """Returns the hidden states before the first block, and what blocks read."""
        denoiser, w = self._denoiser, self._w
        conditioning = denoiser.conditioning(denoiser.condition(w, inputs), inputs)
        return denoiser.embed(w, inputs), conditioning

    def _name(self, piece: str) -> str:
        """Returns a graph's name in the module, which other components share."""
        return f"{self._w.prefix}.{piece}"

    @contextmanager
    def _on_inputs(
        self, name: str, extra: Sequence[TensorType] = ()
    ) -> Iterator[tuple[Graph, dict[str, TensorValue]]]:
        """Opens a graph on a step's inputs, and yields them; others come after."""
        types = [*self._types.values(), *extra]
        name = self._name(name)
        with Graph(name, input_types=types, module=self._module) as graph:
            yield graph, _named(self._types, graph)

    @contextmanager
    def _on_hidden(self, name: str) -> Iterator[tuple[Graph, Streams, ConditioningT]]:
        """Opens a graph on hidden states, and yields what its inputs mean."""
        denoiser = self._denoiser
        batch, *lengths = self._sizes
        hidden = [
            TensorType(denoiser.dtype, (batch, length, denoiser.width), self._w.device)
            for length in lengths
        ]
        names = denoiser.block_inputs
        shared = [self._types[name] for name in names]
        types = [*hidden, *self._condition_types, *shared]
        name = self._name(name)
        with Graph(name, input_types=types, module=self._module) as graph:
            image, text, *rest = (value.tensor for value in graph.inputs)
            start = len(self._condition_types)
            conditioning = denoiser.conditioning(
                tuple(rest[:start]), dict(zip(names, rest[start:], strict=True))
            )
            yield graph, Streams(image, text), conditioning


def _plain(shape: Shape) -> list[Dim | str]:
    """Returns a shape with a name in place of the expression of a joint sequence."""
    return ["joint" if isinstance(dim, AlgebraicDim) else dim for dim in shape]


def _named(types: dict[str, TensorType], graph: Graph) -> dict[str, TensorValue]:
    """Returns a graph's first inputs by these names."""
    return {
        name: value.tensor for name, value in zip(types, graph.inputs, strict=False)
    }
