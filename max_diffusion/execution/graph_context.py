"""Where graphs can be built."""

from __future__ import annotations

from max._mlir_context import in_default_mlir_context

in_graph_context = in_default_mlir_context
"""For functions that build graphs, in whatever thread.

MAX 26.7 enters its context in the main thread only, and ``Graph()`` for its own
construction; ``Module()`` and the shapes of values want it too. No public name enters
it.
"""
