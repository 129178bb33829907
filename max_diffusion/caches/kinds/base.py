"""What a denoising cache is: a policy on the host with state that belongs to a request.

Three kinds. A *step cache* forecasts the prediction of the steps it does not compute. A
*residual cache* runs the first blocks of every step, and knows what the others add
where it does not run them. A *module cache* runs all blocks of every step, and knows
what their attention, or all their modules, give. Each kind brings the routine that runs
a step; another kind is one more file beside these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from max.driver import Buffer

from graphs.denoiser import ModuleLevel

from ...core.grid import Grid
from ...errors import MaxDiffusionError, RequestError
from ...execution.graph_call import Routine

if TYPE_CHECKING:
    from .state import DenoisingCacheState

Inputs: TypeAlias = Mapping[str, Buffer | np.ndarray]
"""What a transformer reads in one step, by name; ``latents`` is ``(B, S_img, C)``."""


@dataclass(frozen=True)
class Run:
    """What a policy may know of the request beforehand."""

    num_steps: int | None = None
    """Denoising steps."""
    timesteps: tuple[float, ...] | None = None
    """Of every step, 1000 at pure noise, as the scheduler gives them."""
    required_steps: frozenset[int] = frozenset()
    """0-based steps that are computed whatever the policy says."""
    grid: Grid | None = None
    """Where the image tokens lie."""
    has_guidance: bool = False
    """Whether there is a second, unconditional branch."""
    is_unconditional: bool = False
    """Whether the state is that branch's."""

    @property
    def later_steps(self) -> frozenset[int]:
        """All steps but the first, which has no history."""
        return frozenset(range(1, self.steps_for("cache")))

    def steps_for(self, name: str) -> int:
        """The number of steps, for a policy that cannot do without."""
        if self.num_steps is None:
            raise RequestError(
                f"{name}: needs the number of steps; give run=Run(num_steps=...) to "
                "create_cache_state"
            )
        return self.num_steps

    def timesteps_for(self, name: str) -> tuple[float, ...]:
        """The timesteps, for a policy that cannot do without."""
        if self.timesteps is None:
            raise RequestError(
                f"{name}: needs the timesteps; give run=Run(timesteps=...) to "
                "create_cache_state"
            )
        return self.timesteps

    def grid_for(self, name: str) -> Grid:
        """The grid, for a policy that cannot do without."""
        if self.grid is None:
            raise RequestError(
                f"{name}: needs the grid of the image tokens under true guidance; give "
                "grid to denoise"
            )
        return self.grid


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


class FullTransformer(Protocol):
    """A transformer that runs as a whole."""

    @property
    def is_divisible(self) -> bool:
        """Whether some samples of a batch can run without the others."""

    def full(self, inputs: Inputs) -> Routine[Buffer]:
        """All of it: the prediction ``(B, S_img, C)``."""

    def rows_of(self, inputs: Inputs, rows: Sequence[int]) -> Inputs:
        """The inputs of some samples as a batch of their own."""


class SplitTransformer(FullTransformer, Protocol):
    """A transformer whose blocks also run one by one."""

    @property
    def num_blocks(self) -> int:
        """Transformer blocks."""

    def embed(self, inputs: Inputs) -> Routine[Hidden]:
        """Inputs to the hidden states before the first block."""

    def run_blocks(self, hidden: Hidden, start: int, stop: int) -> Routine[Hidden]:
        """Blocks ``start`` to ``stop - 1``."""

    def run_and_take(
        self, hidden: Hidden, index: int, level: ModuleLevel
    ) -> Routine[tuple[Hidden, list[Buffer]]]:
        """Block ``index``, and what its modules gave, each ``(B, S, D)``."""

    def run_given(
        self, hidden: Hidden, index: int, level: ModuleLevel, values: Sequence[Buffer]
    ) -> Routine[Hidden]:
        """Block ``index`` with such values in place of its modules'."""

    def output(self, hidden: Hidden) -> Routine[Buffer]:
        """The prediction ``(B, S_img, C)``."""

    def modulated_input(self, hidden: Hidden) -> Routine[Buffer]:
        """What the first block's attention would read, ``(B, S, D)``."""

    def rows_of_hidden(self, hidden: Hidden, rows: Sequence[int]) -> Hidden:
        """The hidden states of some samples as a batch of their own."""


class GuidanceEstimate(Protocol):
    """What is known of the unconditional branch, from the conditional one."""

    @property
    def steps(self) -> frozenset[int]:
        """Steps that estimate."""

    def remember(self, conditional: Buffer, unconditional: Buffer) -> None:
        """Takes in the predictions ``(B, S_img, C)`` of a step that computed both."""

    def estimate(self, conditional: Buffer, step: int) -> Routine[Buffer]:
        """The unconditional prediction ``(B, S_img, C)``."""

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held now."""


@dataclass
class AbstractCacheState(ABC):
    """What one request's guidance branch remembers between steps."""

    @abstractmethod
    def restart(self, batch: int) -> None:
        """Forgets what was computed, before a step of other shapes.

        Args:
            batch: Samples from now on.
        """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of device memory held now."""


class AbstractCache(ABC):
    """The policy of one method: when to compute, and what to do otherwise.

    Holds no state of a request: that is in what :meth:`create_state` returns.
    """

    @abstractmethod
    def create_state(self, run: Run) -> AbstractCacheState:
        """Fresh state of one guidance branch."""

    @abstractmethod
    def run_step(
        self,
        memory: DenoisingCacheState,
        step: int,
        transformer: SplitTransformer,
        inputs: Inputs,
    ) -> Routine[Buffer]:
        """One step: decides, runs what that takes, and remembers.

        Args:
            memory: State of the request's branch; changed in place, and told what was
                done in ``actions`` and ``signal``.
            step: 0-based step index.
            transformer: What runs.
            inputs: Of this step.

        Returns:
            The prediction ``(B, S_img, C)``.
        """

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Steps that may be less than computed, whatever the samples are like.

        Of either guidance branch; rules that require steps are not looked at.
        """
        return run.later_steps

    @property
    def num_always_run(self) -> int:
        """Transformer blocks that run in every step, whatever is decided."""
        return 0

    def create_guidance(self, run: Run) -> GuidanceEstimate | None:
        """What estimates the unconditional branch at some steps, if anything."""
        return None


def latents_shape(inputs: Inputs) -> tuple[int, int]:
    """``(B, S_img)`` of a step's named inputs.

    Raises:
        MaxDiffusionError: There are no latents among them.
    """
    if "latents" not in inputs:
        raise MaxDiffusionError(
            "run_denoising_step: expected latents (B, S_img, C) among the inputs, got "
            f"{', '.join(inputs) or 'none'}"
        )
    batch, seq_len = inputs["latents"].shape[:2]
    return int(batch), int(seq_len)
