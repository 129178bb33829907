"""What one request's guidance branch remembers, whatever its cache."""

from __future__ import annotations

from dataclasses import dataclass

from max.driver import Buffer

from ...core.buffers import num_bytes
from ..actions import Action
from .base import AbstractCache, AbstractCacheState, Inputs


@dataclass
class DenoisingCacheState:
    """All that one request's guidance branch remembers between steps.

    One per request and branch; nothing of it is kept anywhere else, so dropping it
    forgets the request.
    """

    cache: AbstractCache
    """The policy that this state belongs to."""
    state: AbstractCacheState
    """The policy's own memory."""
    required_steps: frozenset[int] = frozenset()
    """0-based steps that are computed whatever the policy says."""
    residual_threshold: float = 0.0
    """Threshold for a ``run_transformer`` that decides on first-block caching
    itself."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of all inputs of the last step."""
    prev_residual: Buffer | None = None
    """First-block residual last returned by a ``run_transformer`` that decides on
    first-block caching itself."""
    prev_output: Buffer | None = None
    """Noise prediction last returned by a ``run_transformer`` that decides on first-
    block caching itself."""
    actions: tuple[Action, ...] = ()
    """What the last step did with each sample."""
    signal: tuple[float, ...] | None = None
    """The signal that the last decision was based on, one value per sample; ``None`` if
    it was based on none."""

    def changes_to(self, inputs: Inputs) -> bool:
        """Returns whether the inputs have other shapes than the last step's.

        What was remembered of other sizes, or of a prompt of another length, says
        nothing of these.
        """
        shapes = tuple(tuple(value.shape) for value in inputs.values())
        is_new, self.shapes = shapes != self.shapes, shapes
        return is_new

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that the branch's state holds now."""
        own = [b for b in (self.prev_residual, self.prev_output) if b is not None]
        return self.state.num_bytes + sum(num_bytes(b) for b in own)
