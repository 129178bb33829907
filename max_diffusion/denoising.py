"""The executor: runs the step graphs that a cache's decision asks for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias, final, get_args

import numpy as np
from max.driver import Buffer
from max.graph import Dim, Module

from graphs.denoiser import AbstractDenoiser, ModuleLevel, StepGraphs
from graphs.weights import WeightScope

from .buffers import num_bytes, put_rows, take_rows, with_rows
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
from .caches.history import relative_error, weighted_sum
from .calls import ALL, GraphCall, Routine, run
from .compile import in_graph_context
from .component import ComponentModel
from .errors import MaxDiffusionError, RequestError

COMPUTE, FORECAST, REUSE = "compute", "predict", "reuse"
PARTIAL, ESTIMATE = "partial", "estimate"
Inputs: TypeAlias = Mapping[str, Buffer | np.ndarray]
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
    context: tuple[Buffer | np.ndarray, ...]
    """What every block reads beside them."""

    @property
    def buffers(self) -> tuple[Buffer | np.ndarray, ...]:
        """All of it, in the order of the graphs' inputs."""
        return (self.image, self.text, *self.context)


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

    @in_graph_context
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
        return lambda **inputs: run(self.models, self.full(inputs))

    def full(self, inputs: Inputs) -> Routine[Buffer]:
        """All blocks: the prediction ``(B, S_img, C)``."""
        outputs = yield GraphCall(
            "full",
            self._ordered(inputs),
            self.device,
            self._shared,
            self._constant,
            stage=1,
        )
        return outputs[0]

    def embed(self, inputs: Inputs) -> Routine[Hidden]:
        """Inputs to the hidden states before the first block."""
        outputs = yield GraphCall(
            "embed",
            self._ordered(inputs),
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
            "output",
            hidden.buffers,
            self.device,
            self._shared_of(hidden),
            stage=self.num_blocks + 1,
        )
        return outputs[0]

    def modulated_input(self, hidden: Hidden) -> Routine[Buffer]:
        """What the first block's attention would read, ``(B, S, D)``."""
        outputs = yield GraphCall(
            "modulated_input", hidden.buffers, self.device, self._shared_of(hidden)
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
            f"{name}_{index}",
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

    def _ordered(self, inputs: Inputs) -> tuple[Buffer | np.ndarray, ...]:
        return tuple(inputs[name] for name in self._input_names)


def run_step_cache(
    cache: AbstractStepCache,
    memory: DenoisingCacheState,
    step: int,
    shape: tuple[int, ...],
    compute: Callable[[Sequence[int] | None], Routine[Buffer]],
    *,
    is_divisible: bool,
) -> Routine[Buffer]:
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
        return (yield from cache.forecast(memory.state, step))
    rows = None if decision.all() else [int(row) for row in np.flatnonzero(decision)]
    computed = yield from compute(rows)
    prediction = computed
    if rows is not None:
        forecast = yield from cache.forecast(memory.state, step)
        prediction = with_rows(forecast, rows, computed)
    error = yield from cache.remember(memory.state, computed, step, rows)
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
    inputs: Inputs,
) -> Routine[Buffer]:
    """One step under a cache that knows what the middle blocks add."""
    state = memory.state
    assert isinstance(state, ResidualState)
    shape = latents_shape(inputs)
    if memory.changes_to(shape):
        state.restart(shape[0])
    start = yield from denoiser.embed(inputs)
    front = yield from denoiser.run_blocks(start, 0, cache.front_blocks)
    now = yield from _signal(cache, denoiser, start, front)
    change = np.zeros(shape[0], np.float32)
    memory.signal = None
    if now is not None and state.reference is not None:
        change = yield from relative_error(now, state.reference)
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
        middle = yield from _compute_middle(cache, state, step, denoiser, front, stop)
    else:
        middle = yield from _reuse_middle(state, step, front)
        if rows:
            part = denoiser.rows_of_hidden(front, rows)
            part = yield from _compute_middle(
                cache, state, step, denoiser, part, stop, rows
            )
            put_rows(middle.image, rows, part.image)
            if state.text_tail is not None:
                put_rows(middle.text, rows, part.text)
    last = yield from denoiser.run_blocks(middle, stop, denoiser.num_blocks)
    return (yield from denoiser.output(last))


def _signal(
    cache: AbstractResidualCache,
    denoiser: DenoiserComponent,
    start: Hidden,
    front: Hidden,
) -> Routine[Buffer | None]:
    if cache.signal == "residual":
        return (yield from _difference(front.image, start.image))
    if cache.signal == "modulated_input":
        return (yield from denoiser.modulated_input(start))
    return None


def _compute_middle(
    cache: AbstractResidualCache,
    state: ResidualState,
    step: int,
    denoiser: DenoiserComponent,
    front: Hidden,
    stop: int,
    rows: Sequence[int] | None = None,
) -> Routine[Hidden]:
    """Runs the middle blocks, of some samples or all, and remembers what they added."""
    middle = yield from denoiser.run_blocks(front, cache.front_blocks, stop)
    tail = yield from _difference(middle.image, front.image)
    state.tail.push(tail, step, rows)
    if state.text_tail is not None:
        tail = yield from _difference(middle.text, front.text)
        state.text_tail.push(tail, step, rows)
    return middle


def _reuse_middle(state: ResidualState, step: int, front: Hidden) -> Routine[Hidden]:
    """What the middle blocks would give, in buffers of its own."""
    tail = yield from state.tail.forecast(step)
    image, text = (yield from weighted_sum([[1, 1]], [front.image, tail])), front.text
    if state.text_tail is not None:
        tail = yield from state.text_tail.forecast(step)
        text = yield from weighted_sum([[1, 1]], [front.text, tail])
    return Hidden(image, text, front.context)


def _difference(after: Buffer, before: Buffer) -> Routine[Buffer]:
    return weighted_sum([[1, -1]], [after, before])


def run_module_cache(
    cache: AbstractModuleCache,
    memory: DenoisingCacheState,
    step: int,
    denoiser: DenoiserComponent,
    inputs: Inputs,
) -> Routine[Buffer]:
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
    hidden = yield from denoiser.embed(inputs)
    for index in range(denoiser.num_blocks):
        if computes:
            hidden, values = yield from denoiser.run_and_take(
                hidden, index, cache.level
            )
            cache.remember(state, index, values, step)
        else:
            values = yield from cache.forecast(state, index, step)
            hidden = yield from denoiser.run_given(hidden, index, cache.level, values)
    return (yield from denoiser.output(hidden))


def run_own_decision(
    memory: DenoisingCacheState,
    step: int,
    shape: tuple[int, ...],
    run_transformer: Callable[[], tuple[Buffer, ...]],
) -> Routine[Buffer]:
    """One step of a ``run_transformer`` that decides on first-block caching itself."""
    yield from ()
    policy = memory.cache
    assert isinstance(policy, FirstBlockCache)
    is_required = step < policy.config.warmup_steps or step in memory.required_steps
    if memory.changes_to(shape) or is_required:
        memory.prev_residual = memory.prev_output = None
    before = memory.prev_output
    outputs = run_transformer()
    if len(outputs) != 2:
        raise MaxDiffusionError(
            "run_transformer: expected (new_residual, noise_pred) under first-block "
            f"caching, got {len(outputs)} values"
        )
    memory.prev_residual, memory.prev_output = outputs
    # Only it knows what it did; giving the old prediction back is a reuse.
    action = REUSE if outputs[1] is before else COMPUTE
    memory.actions = (action,) * shape[0]
    return outputs[1]


def _some(value: Buffer | np.ndarray, rows: Sequence[int]) -> Buffer | np.ndarray:
    if isinstance(value, np.ndarray):
        return value[list(rows)]
    return take_rows(value, rows)


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
