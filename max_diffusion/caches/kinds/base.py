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
"""What a transformer reads in one step, by name; ``latents`` is ``(B, S_img, C)``.

Where there is a reference picture, ``reference`` is its tokens, ``(B, R, C)``: they
follow those of the latents through all blocks, and no prediction has them."""


@dataclass(frozen=True)
class Run:
    """What a policy may know of a request beforehand."""

    num_steps: int | None = None
    """Number of denoising steps; ``None`` if it is not known."""
    timesteps: tuple[float, ...] | None = None
    """Timestep of each step as the scheduler gives it, 1000 at pure noise; ``None`` if
    they are not known."""
    required_steps: frozenset[int] = frozenset()
    """0-based steps that are computed whatever the policy says."""
    grid: Grid | None = None
    """How the image tokens are arranged; ``None`` if it is not known."""
    has_guidance: bool = False
    """Whether the request has a second, unconditional branch."""
    is_unconditional: bool = False
    """Whether the state to create is the unconditional branch's."""
    skipped_steps: int = 0
    """Number of steps of the whole schedule before these, where a picture to start from
    takes their place."""

    @property
    def later_steps(self) -> frozenset[int]:
        """All steps but the first, which has no history."""
        return frozenset(range(1, self.steps_for("cache")))

    def steps_for(self, name: str) -> int:
        """Returns the number of steps for the policy ``name``, which needs it.

        Raises:
            RequestError: The number of steps is not known.
        """
        if self.num_steps is None:
            raise RequestError(
                f"{name}: needs the number of steps; give run=Run(num_steps=...) to "
                "create_cache_state"
            )
        return self.num_steps

    def timesteps_for(self, name: str) -> tuple[float, ...]:
        """Returns the timesteps for the policy ``name``, which needs them.

        Raises:
            RequestError: The timesteps are not known.
        """
        if self.timesteps is None:
            raise RequestError(
                f"{name}: needs the timesteps; give run=Run(timesteps=...) to "
                "create_cache_state"
            )
        return self.timesteps

    def grid_for(self, name: str) -> Grid:
        """Returns the token grid for the policy ``name``, which needs it.

        Raises:
            RequestError: The grid is not known.
        """
        if self.grid is None:
            raise RequestError(
                f"{name}: needs the grid of the image tokens under true guidance; give "
                "grid to denoise"
            )
        return self.grid


@dataclass(frozen=True)
class Hidden:
    """The hidden states of a pass between two blocks."""

    image: Buffer
    """Image stream ``(B, S_img, D)``."""
    text: Buffer
    """Text stream ``(B, S_txt, D)``."""
    context: tuple[Buffer | np.ndarray, ...]
    """The other inputs of every block, which no block changes."""
    drawn: int | None = None
    """Tokens of the image stream that are drawn, its first; those of a reference
    picture follow them. ``None`` for all."""

    @property
    def buffers(self) -> tuple[Buffer | np.ndarray, ...]:
        """Both streams and the context, in the order of the graphs' inputs."""
        return (self.image, self.text, *self.context)


class FullTransformer(Protocol):
    """A transformer that runs as a whole."""

    @property
    def is_divisible(self) -> bool:
        """Whether some samples of a batch can run without the others."""

    def full(self, inputs: Inputs) -> Routine[Buffer]:
        """Runs the whole transformer and returns the prediction ``(B, S_img, C)``."""

    def rows_of(self, inputs: Inputs, rows: Sequence[int]) -> Inputs:
        """Returns the inputs of some samples as a batch of their own."""


class SplitTransformer(FullTransformer, Protocol):
    """A transformer whose blocks also run one by one, or with modules' outputs."""

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks."""

    def run_and_take(
        self, inputs: Inputs, level: ModuleLevel
    ) -> Routine[tuple[Buffer, list[Buffer]]]:
        """Returns the prediction, and what all modules gave, ``(B, S, D)`` each."""

    def run_given(
        self, inputs: Inputs, level: ModuleLevel, values: Sequence[Buffer]
    ) -> Routine[Buffer]:
        """Returns the prediction with ``values`` in place of modules' outputs."""

    def embed(self, inputs: Inputs) -> Routine[Hidden]:
        """Turns inputs into the hidden states before the first block."""

    def run_blocks(self, hidden: Hidden, start: int, stop: int) -> Routine[Hidden]:
        """Runs the blocks ``start`` to ``stop - 1``."""

    def output(self, hidden: Hidden) -> Routine[Buffer]:
        """Turns the hidden states after all blocks into ``(B, S_img, C)``."""

    def modulated_input(self, hidden: Hidden) -> Routine[Buffer]:
        """Returns what the first block's attention would read, ``(B, S, D)``."""

    def rows_of_hidden(self, hidden: Hidden, rows: Sequence[int]) -> Hidden:
        """Returns the hidden states of some samples as a batch of their own."""


class GuidanceEstimate(Protocol):
    """Estimates the unconditional prediction from the conditional one."""

    @property
    def steps(self) -> frozenset[int]:
        """0-based steps that estimate the unconditional prediction."""

    def remember(self, conditional: Buffer, unconditional: Buffer) -> None:
        """Takes in the predictions ``(B, S_img, C)`` of a step that computed both."""

    def estimate(self, conditional: Buffer, step: int) -> Routine[Buffer]:
        """Estimates the unconditional prediction ``(B, S_img, C)`` of a step."""

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that the estimate holds now."""


@dataclass
class AbstractCacheState(ABC):
    """What one request's guidance branch remembers between steps."""

    @abstractmethod
    def restart(self, batch: int) -> None:
        """Forgets what was computed, before a step of other shapes.

        Args:
            batch: Number of samples from now on.
        """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of device memory that the state holds now."""


class AbstractCache(ABC):
    """The policy of one method: when to compute, and what to do otherwise.

    Holds no state of a request: that is in what :meth:`create_state` returns.
    """

    @abstractmethod
    def create_state(self, run: Run) -> AbstractCacheState:
        """Creates the fresh state of one guidance branch."""

    @abstractmethod
    def run_step(
        self,
        memory: DenoisingCacheState,
        step: int,
        transformer: SplitTransformer,
        inputs: Inputs,
    ) -> Routine[Buffer]:
        """Runs one step: decides, computes what is needed, and remembers.

        Args:
            memory: State of the request's branch; changed in place, with what was done
                in ``actions`` and ``signal``.
            step: 0-based step index.
            transformer: The transformer to run.
            inputs: The transformer's inputs of this step.

        Returns:
            The prediction ``(B, S_img, C)``.
        """

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the 0-based steps that may be less than fully computed.

        Counts steps of either guidance branch, whatever the samples are like, and
        ignores the rules that require steps.
        """
        return run.later_steps

    @property
    def num_always_run(self) -> int:
        """Number of transformer blocks that run in every step, whatever is decided."""
        return 0

    def create_guidance(self, run: Run) -> GuidanceEstimate | None:
        """Creates what estimates the unconditional branch, ``None`` if nothing does."""
        return None


def latents_shape(inputs: Inputs) -> tuple[int, int]:
    """Returns ``(B, S_img)`` of a step's named inputs.

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
