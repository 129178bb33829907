"""Graphs that compile together: known from compiled ones, or built from code."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Final, TypeAlias, final

from max.graph import Module

from graphs.weights import WeightNeeds, WeightScope

from .artefacts import Artefact, compiler_versions, hash_of
from .graph_context import in_graph_context

GraphBuilder: TypeAlias = Callable[[Module], WeightScope | None]
"""Adds graphs to a module; returns the scope they drew their weights from, if any."""

# Printing a module counts up in it.
_COUNTERS: Final = re.compile(r"counter = \d+ : i64")


@final
class GraphModule:
    """A module of graphs, which compiles alone and is built only if that is needed.

    Args:
        name: What is in it, such as ``transformer.full``.
        build: Adds its graphs.
        subject: Hash of what they are made of, ``recipe.subject_of``.
        recipe: Hash of that and of the sources, ``recipe.recipe_of``, if there is one.
        artefact: Compiled graphs of the same recipe: nothing has to be built.
    """

    def __init__(
        self,
        name: str,
        build: GraphBuilder,
        subject: str = "",
        recipe: str | None = None,
        artefact: Artefact | None = None,
    ) -> None:
        self.name = name
        self.subject, self.recipe = subject, recipe
        self.artefact = artefact
        self._build = build

    @property
    def module(self) -> Module:
        """The graphs, built when they are first asked for."""
        return self._built[0]

    @property
    def needs(self) -> WeightNeeds:
        """Weights that the graphs draw from."""
        if self.artefact is not None:
            return self.artefact.manifest.needs
        return self._built[1]

    @property
    def graph_names(self) -> tuple[str, ...]:
        """Names of the graphs."""
        if self.artefact is not None:
            return self.artefact.manifest.graphs
        return tuple(self.module.top_level_graph_names())

    @cached_property
    def key(self) -> str:
        """Hash of the graphs' text and of the compiler's versions."""
        text = _COUNTERS.sub("", str(self.module.mlir_module))
        return hash_of(text, compiler_versions())

    @cached_property
    def _built(self) -> tuple[Module, WeightNeeds]:
        return self._build_now()

    @in_graph_context
    def _build_now(self) -> tuple[Module, WeightNeeds]:
        module = Module()
        scope = self._build(module)
        return module, WeightNeeds() if scope is None else scope.needs
