"""The executor: runs the step graphs that a cache's decision asks for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from max.driver import Buffer
from max.graph import Dim, Module

from graphs.denoiser import AbstractDenoiser, add_back, add_front, add_full, add_reuse
from graphs.weights import WeightScope

from .buffers import num_bytes, put_rows, take_rows, to_numpy, with_rows, zeros
from .caches import (
    AbstractResidualCache,
    AbstractStepCache,
    GraphGroup,
    ResidualState,
)
from .caches.base import AbstractCacheState
from .component import ComponentModel
from .errors import RequestError

COMPUTE, FORECAST, REUSE = "compute", "predict", "reuse"


@dataclass
class DenoisingCacheState:
    """All that one request's guidance branch remembers between steps.

    One per request and branch; nothing of it is kept anywhere else, so dropping it
    forgets the request.
    """

    cache: AbstractStepCache | AbstractResidualCache
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
    """What the last step did with each sample: compute, predict or reuse."""
    signal: tuple[float, ...] | None = None
    """What the last decision was based on, per sample."""

    @property
    def residual_threshold(self) -> float:
        """For a ``run_transformer`` that decides in a graph of its own."""
        if isinstance(self.cache, AbstractResidualCache):
            return self.cache.residual_threshold
        return 0.0

    def changes_to(self, shape: tuple[int, ...]) -> bool:
        """Whether a step's ``(B, S_img)`` is not the last one's, which it becomes."""
        is_new, self.shape = shape != self.shape, shape
        return is_new

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held now."""
        own = [b for b in (self.prev_residual, self.prev_output) if b is not None]
        return self.state.num_bytes + sum(num_bytes(b) for b in own)


@dataclass(frozen=True)
class Front:
    """What the front graph returns."""

    image: Buffer
    """Image stream after the front blocks, ``(B, S_img, D)``."""
    text: Buffer
    """Text stream, ``(B, S_txt, D)``."""
    residual: Buffer
    """What the front blocks added to the image stream, ``(B, S_img, D)``."""
    change: np.ndarray
    """Relative change against the reference residual, float32 ``(B,)``."""


class DenoiserComponent(ComponentModel):
    """A transformer component: declares its pieces, gets every step graph.

    Final but for :meth:`denoiser`; ``load_model`` has nothing left to do.
    """

    front_blocks = 1
    """Blocks of the front graph."""
    graph_groups: frozenset[GraphGroup] = frozenset(("full", "split"))
    """Which graphs to build; the pipeline sets what its caches need."""

    @abstractmethod
    def denoiser(self) -> AbstractDenoiser[Any]:
        """The transformer's pieces."""

    def hot_shapes(self) -> Sequence[tuple[int, int, int]]:
        """``(B, S_img, S_txt)`` that deserve a static graph beside the symbolic one."""
        return ()

    def weight_scope(self) -> WeightScope:
        """Where the graphs draw their weights from."""
        return WeightScope("transformer", self.dtype, self.device_ref)

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds the graphs of :attr:`graph_groups`."""
        pieces, w = self.denoiser(), self.weight_scope()
        types = pieces.input_types()
        self._input_names = tuple(types)
        self.batched_inputs = frozenset(
            name for name, kind in types.items() if kind.shape[0] == Dim("batch")
        )
        self._hidden_dtype, self._width = pieces.dtype, pieces.width
        self._static: dict[tuple[int, int, int], str] = {}
        if "full" in self.graph_groups:
            add_full(module, "full", pieces, w)
            for shape in self.hot_shapes():
                name = "full_" + "x".join(str(size) for size in shape)
                add_full(module, name, pieces, w, static_shape=shape)
                self._static[shape] = name
        blocks = self.front_blocks
        # A model of so few blocks has no tail to reuse.
        self.is_split = "split" in self.graph_groups and pieces.num_blocks > blocks
        if self.is_split:
            add_front(module, "front", pieces, w, front_blocks=blocks)
            add_back(module, "back", pieces, w, front_blocks=blocks)
            add_reuse(module, "reuse", pieces, w)
        return w

    def require_split(self) -> None:
        """Raises a RequestError if there is no tail of blocks to reuse."""
        if not self.is_split:
            raise RequestError(
                f"cache: this transformer has no more than {self.front_blocks} blocks, "
                "so none could be reused; use another cache"
            )

    def load_model(self) -> Callable[..., Any] | None:
        """The full transformer, by named inputs."""
        return self.full

    def full(self, **inputs: Buffer) -> Buffer:
        """All blocks: the prediction ``(B, S_img, C)``."""
        batch, image_len = inputs["latents"].shape[:2]
        shape = (int(batch), int(image_len), int(inputs["text"].shape[1]))
        model = self.models[self._static.get(shape, "full")]
        return model.execute(*self._ordered(inputs))[0]

    def front(self, reference: Buffer | None, **inputs: Buffer) -> Front:
        """The first blocks, compared with a reference residual if there is one."""
        if reference is None:
            batch, image_len = inputs["latents"].shape[:2]
            shape = (int(batch), int(image_len), self._width)
            reference = zeros(shape, self._hidden_dtype, self.device)
        outputs = self.models["front"].execute(*self._ordered(inputs), reference)
        image, text, residual, change = outputs
        return Front(image, text, residual, to_numpy(change))

    def back(self, front: Front, **inputs: Buffer) -> tuple[Buffer, Buffer]:
        """The other blocks: the prediction and the tail residual."""
        model = self.models["back"]
        prediction, tail = model.execute(
            *self._ordered(inputs), front.image, front.text
        )
        return prediction, tail

    def reuse(self, image: Buffer, tail_residual: Buffer, **inputs: Buffer) -> Buffer:
        """The output layers on the front's image stream plus a known tail residual."""
        model = self.models["reuse"]
        return model.execute(*self._ordered(inputs), image, tail_residual)[0]

    def rows_of(
        self, inputs: Mapping[str, Buffer], rows: Sequence[int]
    ) -> dict[str, Buffer]:
        """The inputs of some samples as a batch of their own."""
        return {
            name: take_rows(value, rows) if name in self.batched_inputs else value
            for name, value in inputs.items()
        }

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
    inputs: dict[str, Buffer],
) -> Buffer:
    """One step under a cache that decides from the front blocks, sample by sample."""
    state = memory.state
    assert isinstance(state, ResidualState)
    shape = tuple(int(size) for size in inputs["latents"].shape[:2])
    # Another shape: the history starts again.
    reference = None if memory.changes_to(shape) else state.front_residual
    front = denoiser.front(reference, **inputs)
    decision = np.ones(front.change.shape, bool)
    memory.signal = None
    if reference is None:
        state.restart(len(decision))
    else:
        memory.signal = tuple(float(x) for x in front.change)
        if step not in memory.required_steps:
            decision = cache.decide(state, step, front.change)
    memory.actions = tuple(COMPUTE if flag else REUSE for flag in decision)
    state.count(decision, front.change)
    if decision.all():
        prediction, tail = denoiser.back(front, **inputs)
        state.front_residual = front.residual
        state.tail.push(tail, step)
        return prediction
    prediction = denoiser.reuse(front.image, state.tail.forecast(step), **inputs)
    if not decision.any():
        return prediction
    rows = [int(row) for row in np.flatnonzero(decision)]
    part = Front(
        take_rows(front.image, rows),
        take_rows(front.text, rows),
        take_rows(front.residual, rows),
        front.change[decision],
    )
    computed, tail = denoiser.back(part, **denoiser.rows_of(inputs, rows))
    assert state.front_residual is not None
    put_rows(state.front_residual, rows, part.residual)
    state.tail.push(tail, step, rows)
    put_rows(prediction, rows, computed)
    return prediction


@final
@dataclass(frozen=True)
class Branch:
    """One guidance branch: its name and the inputs that stay the same all steps."""

    name: str
    inputs: Mapping[str, Buffer] = field(default_factory=dict)
