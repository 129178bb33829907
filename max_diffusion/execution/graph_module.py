"""Graphs that compile together: known from compiled ones, or built from code."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, TypeAlias, final

from max.graph import Module, default_custom_extensions_scope

from graphs.weights import WeightNeeds, WeightScope

from .artefacts import Artefact, compiler_versions, hash_of
from .graph_context import in_graph_context
from .kernels import kernel_library, operations_hash

GraphBuilder: TypeAlias = Callable[[Module], WeightScope | None]
"""Adds graphs to a module; returns the scope they drew their weights from, if any."""

# Printing a module counts up in it, and names the file of the operations for CPUs.
_COUNTERS: Final = re.compile(r"counter = \d+ : i64")
_LIBRARIES: Final = re.compile(r"_kernel_library_paths = \[[^\]]*\]")
# Every name of such an operation begins with this word.
_OPERATION: Final = re.compile(r'"(diffusion_\w+)"')


@final
class GraphModule:
    """A module of graphs, which compiles alone and is built only if that is needed.

    Args:
        name: What is in it, such as ``transformer.full``.
        build: Adds its graphs.
        subject: Hash of what they are made of, ``recipe.subject_of``.
        recipe: Hash of that and of the sources, ``recipe.recipe_of``, if there is one.
        artefact: Compiled graphs of the same recipe: nothing has to be built.
        is_for_cpu: Whether the graphs may call the operations for CPUs.
    """

    def __init__(
        self,
        name: str,
        build: GraphBuilder,
        subject: str = "",
        recipe: str | None = None,
        artefact: Artefact | None = None,
        *,
        is_for_cpu: bool = False,
    ) -> None:
        self.name = name
        self.subject, self.recipe = subject, recipe
        self.artefact = artefact
        self._build = build
        self._is_for_cpu = is_for_cpu

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
        """Hash of the graphs' text, of operations, and of the compiler's versions."""
        text = _LIBRARIES.sub("", _COUNTERS.sub("", self._text))
        operations = operations_hash(self._operations) if self._operations else ""
        return hash_of(text, operations, compiler_versions())

    @property
    def libraries(self) -> Sequence[Path]:
        """Files of the operations that the graphs call."""
        return [kernel_library()] if self._operations else []

    @cached_property
    def _operations(self) -> frozenset[str]:
        """Names of the operations for CPUs that the graphs call."""
        return frozenset(_OPERATION.findall(self._text))

    @cached_property
    def _text(self) -> str:
        return str(self.module.mlir_module)

    @cached_property
    def _built(self) -> tuple[Module, WeightNeeds]:
        return self._build_now()

    @in_graph_context
    def _build_now(self) -> tuple[Module, WeightNeeds]:
        module = Module()
        libraries = [kernel_library()] if self._is_for_cpu else []
        with default_custom_extensions_scope(*libraries):
            scope = self._build(module)
        return module, WeightNeeds() if scope is None else scope.needs
