"""A transformer component: runs the step graphs that a cache asks for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Final, cast, get_args

import numpy as np
from max.driver import Buffer
from max.graph import Module

from graphs.denoiser import AbstractDenoiser, ModuleLevel, StepGraphs
from graphs.weights import WeightScope

from ..caches import (
    AbstractCache,
    AbstractCacheConfig,
    DenoisingCacheState,
    GraphGroup,
)
from ..caches.kinds import Hidden, Inputs
from ..core.buffers import first_tokens, join_tokens
from ..errors import RequestError
from ..execution.component import ComponentModel
from ..execution.graph_call import ALL, GraphCall, Routine, run
from ..execution.graph_module import GraphBuilder
from .state_sizes import StateSizer
from .step_inputs import REFERENCE, StepInputs

# Groups of graphs that no transformer brings.
_OF_OTHERS: Final = frozenset(("series",))


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

    def graph_modules(self) -> Mapping[str, GraphBuilder]:
        """Returns what builds each of :attr:`graph_groups`, in a module of its own."""
        return {
            f"{self.name}.{group}": partial(self._build_group, group)
            for group in get_args(GraphGroup)
            if group in self.graph_groups and group not in _OF_OTHERS
        }

    def _build_group(self, group: str, module: Module) -> WeightScope:
        w = self.weight_scope()
        graphs = StepGraphs(module, self.denoiser(), w)
        if group == "full":
            graphs.add_full()
        elif group == "blocks":
            graphs.add_blocks()
        else:
            graphs.add_modules(cast(ModuleLevel, group))
        return w

    @cached_property
    def inputs(self) -> StepInputs:
        """What the graphs of a step take."""
        return StepInputs.of(self.denoiser())

    @cached_property
    def sizes(self) -> StateSizer:
        """What caches would keep of a request."""
        return StateSizer(self)

    def load_model(self) -> Callable[..., Any] | None:
        """The full transformer, by named inputs."""
        return lambda **inputs: run(self.models, self.full(inputs))

    def full(self, inputs: Inputs) -> Routine[Buffer]:
        """All blocks: the prediction ``(B, S_img, C)``."""
        prediction, *_ = yield from self._run_whole("full", inputs)
        return prediction

    def run_and_take(
        self, inputs: Inputs, level: ModuleLevel
    ) -> Routine[tuple[Buffer, list[Buffer]]]:
        """All blocks: the prediction, and what their modules gave, ``(B, S, D)`` each.

        The values are in the order of the blocks.
        """
        prediction, *values = yield from self._run_whole(level, inputs)
        return prediction, values

    def run_given(
        self, inputs: Inputs, level: ModuleLevel, values: Sequence[Buffer]
    ) -> Routine[Buffer]:
        """All blocks with such values in place of their modules': the prediction."""
        prediction, *_ = yield from self._run_whole(f"given_{level}", inputs, values)
        return prediction

    def embed(self, inputs: Inputs) -> Routine[Hidden]:
        """Inputs to the hidden states before the first block."""
        inputs, drawn = self._with_reference(inputs)
        outputs = yield GraphCall(
            f"{self.name}.embed",
            tuple(inputs[name] for name in self.inputs.names),
            self.device,
            self.inputs.shared,
            self.inputs.constant,
            num_passing=ALL,
        )
        image, text, *condition = outputs
        shared = [inputs[name] for name in self.inputs.of_blocks]
        return Hidden(image, text, (*condition, *shared), drawn)

    def run_blocks(self, hidden: Hidden, start: int, stop: int) -> Routine[Hidden]:
        """Blocks ``start`` to ``stop - 1``; all but the first of all in one call."""
        count, index = self.num_blocks, start
        while index < stop:
            is_rest = (index, stop) == (1, count) and count > 2
            name = f"blocks_1_{count}" if is_rest else f"block_{index}"
            outputs = yield GraphCall(
                f"{self.name}.{name}",
                hidden.buffers,
                self.device,
                self.inputs.shared_of(hidden),
                num_passing=2,
                stage=index + 1,
            )
            hidden = replace(hidden, image=outputs[0], text=outputs[1])
            index = stop if is_rest else index + 1
        return hidden

    def output(self, hidden: Hidden) -> Routine[Buffer]:
        """The prediction ``(B, S_img, C)``."""
        outputs = yield GraphCall(
            f"{self.name}.output",
            hidden.buffers,
            self.device,
            self.inputs.shared_of(hidden),
            stage=self.num_blocks + 1,
        )
        drawn = hidden.drawn
        return outputs[0] if drawn is None else first_tokens(outputs[0], drawn)

    def modulated_input(self, hidden: Hidden) -> Routine[Buffer]:
        """What the first block's attention would read, ``(B, S, D)``."""
        outputs = yield GraphCall(
            f"{self.name}.modulated_input",
            hidden.buffers,
            self.device,
            self.inputs.shared_of(hidden),
        )
        return outputs[0]

    def rows_of(
        self, inputs: Inputs, rows: Sequence[int]
    ) -> dict[str, Buffer | np.ndarray]:
        """The inputs of some samples as a batch of their own."""
        return self.inputs.rows_of(inputs, rows)

    def rows_of_hidden(self, hidden: Hidden, rows: Sequence[int]) -> Hidden:
        """The hidden states of some samples as a batch of their own."""
        return self.inputs.rows_of_hidden(hidden, rows)

    def _run_whole(
        self, graph: str, inputs: Inputs, values: Sequence[Buffer] = ()
    ) -> Routine[list[Buffer]]:
        """A graph of a whole step; first of its outputs is the prediction."""
        inputs, drawn = self._with_reference(inputs)
        outputs = yield GraphCall(
            f"{self.name}.{graph}",
            (*(inputs[name] for name in self.inputs.names), *values),
            self.device,
            self.inputs.shared,
            self.inputs.constant,
            stage=1,
        )
        if drawn is None:
            return list(outputs)
        return [first_tokens(outputs[0], drawn), *outputs[1:]]

    def _with_reference(self, inputs: Inputs) -> tuple[Inputs, int | None]:
        """The inputs of graphs, and how many of their tokens are drawn, if not all."""
        reference = inputs.get(REFERENCE)
        if reference is None:
            return inputs, None
        latents = inputs["latents"]
        assert isinstance(latents, Buffer)
        assert isinstance(reference, Buffer)
        joined = join_tokens(latents, reference)
        return {**inputs, "latents": joined}, int(latents.shape[1])
