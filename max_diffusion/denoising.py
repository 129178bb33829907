"""The executor: runs the step graphs that a cache's decision asks for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final, get_args

import numpy as np
from max.driver import Buffer
from max.graph import Dim, Module

from graphs.denoiser import AbstractDenoiser, ModuleLevel, StepGraphs
from graphs.weights import WeightScope

from .buffers import num_bytes, put_rows, take_rows, to_device, to_numpy, with_rows
from .caches import (
    AbstractModuleCache,
    AbstractResidualCache,
    AbstractStepCache,
    FirstBlockCache,
    GraphGroup,
    GuidanceEstimate,
    ModuleState,
    ResidualState,
    Run,
    StateSizes,
)
from .caches.base import AbstractCacheState
from .component import ComponentModel
from .errors import MaxDiffusionError, RequestError

COMPUTE, FORECAST, REUSE = "compute", "predict", "reuse"
PARTIAL, ESTIMATE = "partial", "estimate"
Policy = AbstractStepCache | AbstractResidualCache | AbstractModuleCache


@dataclass
class DenoisingCacheState:
    """All that one request's guidance branch remembers between steps.

    One per request and branch; nothing of it is kept anywhere else, so dropping it
    forgets the request.
    """

    cache: Policy
    """The policy this state belongs to."""
    state: AbstractCacheState
    """The policy's own memory."""
    required_steps: frozenset[int] = frozenset()
    """Steps that are computed whatever the policy says."""
    shape: tuple[int, ...] = ()
    """``(B, S_img)`` of the last step."""
    prev_residual: Buffer | None = None
    """First-block residual last returned by such a ``run_transformer``."""
    prev_output: Buffer | None = None
    """Its noise prediction."""
    actions: tuple[str, ...] = ()
    """What the last step did with each sample: compute, predict, reuse,
    partial or estimate."""
    signal: tuple[float, ...] | None = None
    """What the last decision was based on, per sample."""

    @property
    def residual_threshold(self) -> float:
        """For a ``run_transformer`` that decides in a graph of its own."""
        if isinstance(self.cache, FirstBlockCache):
            return self.cache.config.threshold
        return 0.0

    def changes_to(self, shape: tuple[int, ...]) -> bool:
        """Whether a step's ``(B, S_img)`` is not the last one's, which it becomes."""
        is_new, self.shape = shape != self.shape, shape
        return is_new

    def create_guidance(self, run: Run) -> GuidanceEstimate | None:
        """What estimates the other branch at some steps, if there is one to."""
        if not run.has_guidance or not isinstance(self.cache, AbstractModuleCache):
            return None
        known = replace(run, required_steps=self.required_steps)
        return self.cache.create_guidance(known)

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held now."""
        own = [b for b in (self.prev_residual, self.prev_output) if b is not None]
        return self.state.num_bytes + sum(num_bytes(b) for b in own)


@dataclass(frozen=True)
class Hidden:
    """Where a pass stands between two blocks."""

    image: Buffer
    """Image stream, ``(B, S_img, D)``."""
    text: Buffer
    """Text stream, ``(B, S_txt, D)``."""
    context: tuple[Buffer, ...]
    """What every block reads beside them."""


class DenoiserComponent(ComponentModel):
    """A transformer component: declares its pieces, gets every step graph.

    Final but for :meth:`denoiser`; ``load_model`` has nothing left to do.
    """

    graph_groups: frozenset[GraphGroup] = frozenset(("full", "blocks"))
    """Which graphs to build; the pipeline sets what its caches need."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Facts of the model, each found out once: nothing of a request is in them.
        self._elements: dict[str, tuple[int, int]] = {}

    @abstractmethod
    def denoiser(self) -> AbstractDenoiser[Any]:
        """The transformer's pieces."""

    @cached_property
    def num_blocks(self) -> int:
        """Transformer blocks."""
        return self.denoiser().num_blocks

    def check_policy(self, policy: Policy) -> None:
        """Whether a cache leaves some blocks between those that always run.

        Raises:
            RequestError: It does not, so it would have no effect.
        """
        if not isinstance(policy, AbstractResidualCache):
            return
        always = policy.front_blocks + policy.back_blocks
        if always >= self.num_blocks:
            raise RequestError(
                f"cache: {always} blocks would always run, but this transformer has "
                f"{self.num_blocks}, so none could be reused; use another cache or "
                "fewer front_blocks and back_blocks"
            )

    def weight_scope(self) -> WeightScope:
        """Where the graphs draw their weights from."""
        return WeightScope("transformer", self.dtype, self.device_ref)

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

    def state_sizes(
        self,
        shape: tuple[int, int, int],
        branches: int = 1,
        levels: Collection[str] = get_args(ModuleLevel),
    ) -> StateSizes:
        """What caches would keep, from the shapes of graphs that nobody compiles.

        Args:
            shape: ``(B, S_img, S_txt)``.
            branches: 2 with true guidance.
            levels: Of the modules to look at; the first time a large model's take
                seconds.
        """
        batch, *lengths = (int(size) for size in shape)
        item = batch * self.denoiser().dtype.size_in_bytes
        image, text = lengths

        def of(name: str) -> int:
            of_image, of_text = self._token_elements(name)
            return item * (of_image * image + of_text * text)

        width = self.denoiser().width
        return StateSizes(
            prediction=of("output"),
            image=item * image * width,
            text=item * text * width,
            modulated_input=of("modulated_input"),
            modules={
                level: of(level) for level in get_args(ModuleLevel) if level in levels
            },
            branches=branches,
        )

    def _token_elements(self, name: str) -> tuple[int, int]:
        """Elements of a kind of value for each image token, and each text token."""
        if name not in self._elements:
            # By these lengths, image, text and joint sequences are told apart.
            graphs = StepGraphs(
                Module(), self.denoiser(), self.weight_scope(), (1, 1, 2)
            )
            shapes = {
                "output": lambda: [graphs.add_output()],
                "modulated_input": lambda: [graphs.add_modulated_input()],
                "attention": lambda: graphs.add_modules("attention"),
                "modules": lambda: graphs.add_modules("modules"),
            }[name]()
            counts = [0, 0]
            for _, length, width in shapes:
                counts[0] += int(width) * (int(length) in (1, 3))
                counts[1] += int(width) * (int(length) in (2, 3))
            self._elements[name] = (counts[0], counts[1])
        return self._elements[name]

    def load_model(self) -> Callable[..., Any] | None:
        """The full transformer, by named inputs."""
        return self.full

    def full(self, **inputs: Buffer) -> Buffer:
        """All blocks: the prediction ``(B, S_img, C)``."""
        return self.models["full"].execute(*self._ordered(inputs))[0]

    def embed(self, inputs: Mapping[str, Buffer]) -> Hidden:
        """Inputs to the hidden states before the first block."""
        image, text, *condition = self.models["embed"].execute(*self._ordered(inputs))
        shared = [inputs[name] for name in self._block_inputs]
        return Hidden(image, text, (*condition, *shared))

    def run_blocks(self, hidden: Hidden, start: int, stop: int) -> Hidden:
        """Blocks ``start`` to ``stop - 1``."""
        for index in range(start, stop):
            hidden = self._run(f"block_{index}", hidden)[0]
        return hidden

    def run_and_take(
        self, hidden: Hidden, index: int, level: ModuleLevel
    ) -> tuple[Hidden, list[Buffer]]:
        """Block ``index``, and what its modules gave, each ``(B, S, D)``."""
        return self._run(f"{level}_{index}", hidden)

    def run_given(
        self, hidden: Hidden, index: int, level: ModuleLevel, values: Sequence[Buffer]
    ) -> Hidden:
        """Block ``index`` with such values in place of its modules'."""
        return self._run(f"given_{level}_{index}", hidden, values)[0]

    def output(self, hidden: Hidden) -> Buffer:
        """The prediction ``(B, S_img, C)``."""
        streams = hidden.image, hidden.text
        return self.models["output"].execute(*streams, *hidden.context)[0]

    def modulated_input(self, hidden: Hidden) -> Buffer:
        """What the first block's attention would read, ``(B, S, D)``."""
        streams = hidden.image, hidden.text
        return self.models["modulated_input"].execute(*streams, *hidden.context)[0]

    def weighted_sum(self, *terms: tuple[float, Buffer]) -> Buffer:
        """``weight * value`` added up, in float32, of at most five values."""
        values = [value for _, value in terms]
        row = np.array([weight for weight, _ in terms], np.float32)
        weights = np.tile(row, (int(values[0].shape[0]), 1))
        model = self.models[f"weighted_sum_{len(terms)}"]
        return model.execute(to_device(weights, self.device), *values)[0]

    def change(self, now: Buffer, reference: Buffer) -> np.ndarray:
        """``mean|now - reference| / mean|reference|`` of each sample, float32."""
        return to_numpy(self.models["relative_error"].execute(now, reference)[0])

    def rows_of(
        self, inputs: Mapping[str, Buffer], rows: Sequence[int]
    ) -> dict[str, Buffer]:
        """The inputs of some samples as a batch of their own."""
        return {
            name: take_rows(value, rows) if name in self.batched_inputs else value
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
                *(take_rows(value, rows) for value in condition),
                *self.rows_of(named, rows).values(),
            ),
        )

    def _run(
        self, name: str, hidden: Hidden, values: Sequence[Buffer] = ()
    ) -> tuple[Hidden, list[Buffer]]:
        streams = hidden.image, hidden.text
        outputs = self.models[name].execute(*streams, *hidden.context, *values)
        image, text, *taken = outputs
        return Hidden(image, text, hidden.context), taken

    def _ordered(self, inputs: Mapping[str, Buffer]) -> list[Buffer]:
        return [inputs[name] for name in self._input_names]


def run_step_cache(
    cache: AbstractStepCache,
    memory: DenoisingCacheState,
    step: int,
    shape: tuple[int, ...],
    compute: Callable[[Sequence[int] | None], Buffer],
    *,
    is_divisible: bool,
) -> Buffer:
    """One step under a cache that forecasts predictions.

    Args:
        cache: The policy.
        memory: Its state, and what the step did.
        step: 0-based step index.
        shape: ``(B, S_img)`` of the latents; where it changes, all samples compute.
        compute: The prediction of some samples, or of all for ``None``.
        is_divisible: Whether it can compute only some.
    """
    decision = np.ones(shape[0], bool)
    if not memory.changes_to(shape) and step not in memory.required_steps:
        decision = cache.decide(memory.state, step, shape[0])
    if decision.any() and not is_divisible:
        decision[:] = True
    memory.actions = tuple(COMPUTE if flag else FORECAST for flag in decision)
    memory.signal = None
    if not decision.any():
        return cache.forecast(memory.state, step)
    rows = None if decision.all() else [int(row) for row in np.flatnonzero(decision)]
    computed = compute(rows)
    prediction = computed
    if rows is not None:
        prediction = with_rows(cache.forecast(memory.state, step), rows, computed)
    error = cache.remember(memory.state, computed, step, rows)
    if error is not None:
        signal = np.full(shape[0], np.nan)
        signal[decision] = error
        memory.signal = tuple(float(x) for x in signal)
    return prediction


def run_residual_cache(
    cache: AbstractResidualCache,
    memory: DenoisingCacheState,
    step: int,
    denoiser: DenoiserComponent,
    inputs: Mapping[str, Buffer],
) -> Buffer:
    """One step under a cache that knows what the middle blocks add."""
    state = memory.state
    assert isinstance(state, ResidualState)
    shape = latents_shape(inputs)
    if memory.changes_to(shape):
        state.restart(shape[0])
    start = denoiser.embed(inputs)
    front = denoiser.run_blocks(start, 0, cache.front_blocks)
    now = _signal(cache, denoiser, start, front)
    change = np.zeros(shape[0], np.float32)
    memory.signal = None
    if now is not None and state.reference is not None:
        change = denoiser.change(now, state.reference)
        memory.signal = tuple(float(x) for x in change)
    decision = np.ones(shape[0], bool)
    if not state.tail.is_empty and step not in memory.required_steps:
        decision = cache.decide(state, step, change)
    memory.actions = tuple(COMPUTE if flag else REUSE for flag in decision)
    state.count(decision, cache.measure(change))
    rows = [int(row) for row in np.flatnonzero(decision)]
    if now is not None and (cache.compares_neighbours or decision.all()):
        state.reference = now
    elif now is not None and rows:
        assert state.reference is not None
        state.reference = with_rows(state.reference, rows, take_rows(now, rows))
    stop = denoiser.num_blocks - cache.back_blocks
    if decision.all():
        middle = _compute_middle(cache, state, step, denoiser, front, stop)
    else:
        middle = _reuse_middle(state, step, denoiser, front)
        if rows:
            part = denoiser.rows_of_hidden(front, rows)
            part = _compute_middle(cache, state, step, denoiser, part, stop, rows)
            put_rows(middle.image, rows, part.image)
            if state.text_tail is not None:
                put_rows(middle.text, rows, part.text)
    return denoiser.output(denoiser.run_blocks(middle, stop, denoiser.num_blocks))


def _signal(
    cache: AbstractResidualCache,
    denoiser: DenoiserComponent,
    start: Hidden,
    front: Hidden,
) -> Buffer | None:
    if cache.signal == "residual":
        return denoiser.weighted_sum((1, front.image), (-1, start.image))
    if cache.signal == "modulated_input":
        return denoiser.modulated_input(start)
    return None


def _compute_middle(
    cache: AbstractResidualCache,
    state: ResidualState,
    step: int,
    denoiser: DenoiserComponent,
    front: Hidden,
    stop: int,
    rows: Sequence[int] | None = None,
) -> Hidden:
    """Runs the middle blocks, of some samples or all, and remembers what they added."""
    middle = denoiser.run_blocks(front, cache.front_blocks, stop)
    tail = denoiser.weighted_sum((1, middle.image), (-1, front.image))
    state.tail.push(tail, step, rows)
    if state.text_tail is not None:
        tail = denoiser.weighted_sum((1, middle.text), (-1, front.text))
        state.text_tail.push(tail, step, rows)
    return middle


def _reuse_middle(
    state: ResidualState, step: int, denoiser: DenoiserComponent, front: Hidden
) -> Hidden:
    """What the middle blocks would give, in buffers of its own."""
    tail = state.tail.forecast(step)
    image, text = denoiser.weighted_sum((1, front.image), (1, tail)), front.text
    if state.text_tail is not None:
        tail = state.text_tail.forecast(step)
        text = denoiser.weighted_sum((1, front.text), (1, tail))
    return Hidden(image, text, front.context)


def run_module_cache(
    cache: AbstractModuleCache,
    memory: DenoisingCacheState,
    step: int,
    denoiser: DenoiserComponent,
    inputs: Mapping[str, Buffer],
) -> Buffer:
    """One step under a cache that knows what modules give: all samples alike."""
    state = memory.state
    assert isinstance(state, ModuleState)
    shape = latents_shape(inputs)
    if memory.changes_to(shape):
        state.memories.clear()
    is_required = state.is_empty or step in memory.required_steps
    computes = is_required or cache.decide(state, step)
    memory.actions = (COMPUTE if computes else PARTIAL,) * shape[0]
    memory.signal = None
    hidden = denoiser.embed(inputs)
    for index in range(denoiser.num_blocks):
        if computes:
            hidden, values = denoiser.run_and_take(hidden, index, cache.level)
            cache.remember(state, index, values, step)
        else:
            values = cache.forecast(state, index, step)
            hidden = denoiser.run_given(hidden, index, cache.level, values)
    return denoiser.output(hidden)


def latents_shape(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """``(B, S_img)`` of a step's named inputs."""
    if "latents" not in inputs:
        raise MaxDiffusionError(
            "run_denoising_step: expected latents (B, S_img, C) among the inputs, got "
            f"{', '.join(inputs) or 'none'}"
        )
    return tuple(int(size) for size in inputs["latents"].shape[:2])


@final
@dataclass(frozen=True)
class Branch:
    """One guidance branch: its name and the inputs that stay the same all steps."""

    name: str
    inputs: Mapping[str, Buffer] = field(default_factory=dict)
