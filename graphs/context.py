"""What a thread needs before it builds graphs."""

from __future__ import annotations

# MAX 26.7 enters its context in the main thread only, and Graph() for its own
# construction; Module() and the shapes of values want it too. No public name enters it.
from max._mlir_context import in_default_mlir_context as in_graph_context

__all__ = ["in_graph_context"]
