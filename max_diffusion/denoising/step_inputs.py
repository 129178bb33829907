"""What the graphs of a step take: names, order, and which of it is a request's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Self, final

import numpy as np
from max.driver import Buffer
from max.graph import Dim

from graphs.denoiser import AbstractDenoiser

from ..caches.kinds import Hidden, Inputs
from ..core.buffers import take_rows
from ..execution.graph_context import in_graph_context

REFERENCE: Final = "reference"
"""Input of the tokens of a reference picture, ``(B, R, C)``."""


@final
@dataclass(frozen=True)
class StepInputs:
    """The inputs of a transformer's graphs."""

    names: tuple[str, ...]
    """In graph order, ``latents`` first."""
    batched: frozenset[str]
    """Those with a batch axis; tokens of a reference picture too, which no graph has
    as an input of their own."""
    of_blocks: tuple[str, ...]
    """Those that blocks and output read themselves."""

    @classmethod
    @in_graph_context
    def of(cls, denoiser: AbstractDenoiser[Any]) -> Self:
        """Returns the inputs that a transformer's pieces declare."""
        types, batch = denoiser.input_types(), Dim("batch")
        batched = (name for name, kind in types.items() if kind.shape[0] == batch)
        return cls(
            tuple(types), frozenset((*batched, REFERENCE)), denoiser.block_inputs
        )

    @cached_property
    def shared(self) -> frozenset[int]:
        """Positions of the inputs without a batch axis."""
        return frozenset(
            place for place, name in enumerate(self.names) if name not in self.batched
        )

    @cached_property
    def constant(self) -> frozenset[int]:
        """Positions of the inputs that are the same in all steps."""
        return frozenset(
            place
            for place, name in enumerate(self.names)
            if name not in ("latents", "timestep")
        )

    def shared_of(self, hidden: Hidden) -> frozenset[int]:
        """Returns the positions without a batch axis of a graph on hidden states."""
        start = len(hidden.buffers) - len(self.of_blocks)
        return frozenset(
            start + place
            for place, name in enumerate(self.of_blocks)
            if name not in self.batched
        )

    def rows_of(
        self, inputs: Inputs, rows: Sequence[int]
    ) -> dict[str, Buffer | np.ndarray]:
        """Returns the inputs of some samples as a batch of their own."""
        return {
            name: _some(value, rows) if name in self.batched else value
            for name, value in inputs.items()
        }

    def rows_of_hidden(self, hidden: Hidden, rows: Sequence[int]) -> Hidden:
        """Returns the hidden states of some samples as a batch of their own."""
        count = len(hidden.context) - len(self.of_blocks)
        condition, shared = hidden.context[:count], hidden.context[count:]
        named = dict(zip(self.of_blocks, shared, strict=True))
        return replace(
            hidden,
            image=take_rows(hidden.image, rows),
            text=take_rows(hidden.text, rows),
            context=(
                *(_some(value, rows) for value in condition),
                *self.rows_of(named, rows).values(),
            ),
        )


def _some(value: Buffer | np.ndarray, rows: Sequence[int]) -> Buffer | np.ndarray:
    if isinstance(value, np.ndarray):
        return value[list(rows)]
    return take_rows(value, rows)
