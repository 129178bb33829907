"""A transformer component: runs the step graphs that a cache asks for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, get_args

import numpy as np
from max.driver import Buffer
from max.graph import Dim, Module

from graphs.denoiser import AbstractDenoiser, ModuleLevel, StepGraphs
from graphs.weights import WeightScope

from ..caches import (
    AbstractCache,
    AbstractCacheConfig,
    DenoisingCacheState,
    GraphGroup,
)
from ..caches.kinds import Hidden, Inputs
from ..core.buffers import take_rows
from ..errors import RequestError
from ..execution.component import ComponentModel
from ..execution.graph_call import ALL, GraphCall, Routine, run
from .state_sizes import StateSizer


class DenoiserComponent(ComponentModel):
    """A transformer component: declares its pieces, gets every step graph.

    Final but for :meth:`denoiser`; ``load_model`` has nothing left to do.
    """

    name: str = "transformer"
    graph_groups: frozenset[GraphGroup] = frozenset(("full", "blocks"))
    """Which graphs to build; the pipeline sets what its caches need."""
    is_divisible: bool = True
    """Any samples of a batch can run without the others."""

    @abstractmethod
    def denoiser(self) -> AbstractDenoiser[Any]:
        """The transformer's pieces."""

    @cached_property
    def num_blocks(self) -> int:
        """Transformer blocks."""
        return self.denoiser().num_blocks

    def check(self, config: AbstractCacheConfig, cache: AbstractCache) -> None:
        """Whether a cache leaves some blocks between those that always run.

        Raises:
            RequestError: It does not, so it would have no effect.
        """
        if cache.num_always_run >= self.num_blocks:
            raise RequestError(
                f"{config.name}: {cache.num_always_run} blocks would always run, but "
                f"this transformer has {self.num_blocks}, so none could be reused; use "
                "another cache or fewer front_blocks and back_blocks"
            )

    def run_step(
        self, memory: DenoisingCacheState, step: int, inputs: Inputs
    ) -> Routine[Buffer]:
        """One step under a cache: the prediction ``(B, S_img, C)``."""
        return memory.cache.run_step(memory, step, self, inputs)

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds the graphs of :attr:`graph_groups`."""
        pieces, w = self.denoiser(), self.weight_scope()
        types = pieces.input_types()
        self._input_names = tuple(types)
        self._block_inputs = pieces.block_inputs
        self.batched_inputs = frozenset(
            name for name, kind in types.items() if kind.shape[0] == Dim("batch")
        )
        graphs = StepGraphs(module, pieces, w)
        if "full" in self.graph_groups:
            graphs.add_full()
        if "blocks" in self.graph_groups:
            graphs.add_blocks()
        for level in get_args(ModuleLevel):
            if level in self.graph_groups:
                graphs.add_modules(level)
        return w

    @cached_property
    def sizes(self) -> StateSizer:
        """What caches would keep of a request."""
        return StateSizer(self)

    def load_model(self) -> Callable[..., Any] | None:
        """The full transformer, by named inputs."""
        return lambda **inputs: run(self.models, self.full(inputs))

    def full(self, inputs: Inputs) -> Routine[Buffer]:
        """All blocks: the prediction ``(B, S_img, C)``."""
        outputs = yield GraphCall(
            f"{self.name}.full",
            tuple(inputs[name] for name in self._input_names),
            self.device,
            self._shared,
            self._constant,
            stage=1,
        )
        return outputs[0]

    def embed(self, inputs: Inputs) -> Routine[Hidden]:
        """Inputs to the hidden states before the first block."""
        outputs = yield GraphCall(
            f"{self.name}.embed",
            tuple(inputs[name] for name in self._input_names),
            self.device,
            self._shared,
            self._constant,
            num_passing=ALL,
        )
        image, text, *condition = outputs
        shared = [inputs[name] for name in self._block_inputs]
        return Hidden(image, text, (*condition, *shared))

    def run_blocks(self, hidden: Hidden, start: int, stop: int) -> Routine[Hidden]:
        """Blocks ``start`` to ``stop - 1``."""
        for index in range(start, stop):
            hidden, _ = yield from self._run("block", index, hidden)
        return hidden

    def run_and_take(
        self, hidden: Hidden, index: int, level: ModuleLevel
    ) -> Routine[tuple[Hidden, list[Buffer]]]:
        """Block ``index``, and what its modules gave, each ``(B, S, D)``."""
        return self._run(level, index, hidden)

    def run_given(
        self, hidden: Hidden, index: int, level: ModuleLevel, values: Sequence[Buffer]
    ) -> Routine[Hidden]:
        """Block ``index`` with such values in place of its modules'."""
        hidden, _ = yield from self._run(f"given_{level}", index, hidden, values)
        return hidden

    def output(self, hidden: Hidden) -> Routine[Buffer]:
        """The prediction ``(B, S_img, C)``."""
        outputs = yield GraphCall(
            f"{self.name}.output",
            hidden.buffers,
            self.device,
            self._shared_of(hidden),
            stage=self.num_blocks + 1,
        )
        return outputs[0]

    def modulated_input(self, hidden: Hidden) -> Routine[Buffer]:
        """What the first block's attention would read, ``(B, S, D)``."""
        outputs = yield GraphCall(
            f"{self.name}.modulated_input",
            hidden.buffers,
            self.device,
            self._shared_of(hidden),
        )
        return outputs[0]

    def rows_of(
        self, inputs: Inputs, rows: Sequence[int]
    ) -> dict[str, Buffer | np.ndarray]:
        """The inputs of some samples as a batch of their own."""
        return {
            name: _some(value, rows) if name in self.batched_inputs else value
            for name, value in inputs.items()
        }

    def rows_of_hidden(self, hidden: Hidden, rows: Sequence[int]) -> Hidden:
        """The hidden states of some samples as a batch of their own."""
        count = len(hidden.context) - len(self._block_inputs)
        condition, shared = hidden.context[:count], hidden.context[count:]
        named = dict(zip(self._block_inputs, shared, strict=True))
        return Hidden(
            take_rows(hidden.image, rows),
            take_rows(hidden.text, rows),
            (
                *(_some(value, rows) for value in condition),
                *self.rows_of(named, rows).values(),
            ),
        )

    def _run(
        self, name: str, index: int, hidden: Hidden, values: Sequence[Buffer] = ()
    ) -> Routine[tuple[Hidden, list[Buffer]]]:
        outputs = yield GraphCall(
            f"{self.name}.{name}_{index}",
            (*hidden.buffers, *values),
            self.device,
            self._shared_of(hidden),
            num_passing=2,
            stage=index + 1,
        )
        image, text, *taken = outputs
        return Hidden(image, text, hidden.context), taken

    @cached_property
    def _shared(self) -> frozenset[int]:
        """Positions of the inputs without a batch axis."""
        return frozenset(
            place
            for place, name in enumerate(self._input_names)
            if name not in self.batched_inputs
        )

    @cached_property
    def _constant(self) -> frozenset[int]:
        """Positions of the inputs that are the same in all steps."""
        return frozenset(
            place
            for place, name in enumerate(self._input_names)
            if name not in ("latents", "timestep")
        )

    def _shared_of(self, hidden: Hidden) -> frozenset[int]:
        """The same among the inputs of a graph on hidden states."""
        start = len(hidden.buffers) - len(self._block_inputs)
        return frozenset(
            start + place
            for place, name in enumerate(self._block_inputs)
            if name not in self.batched_inputs
        )


def _some(value: Buffer | np.ndarray, rows: Sequence[int]) -> Buffer | np.ndarray:
    if isinstance(value, np.ndarray):
        return value[list(rows)]
    return take_rows(value, rows)
