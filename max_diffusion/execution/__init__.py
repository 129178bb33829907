"""Graphs at run time: calls as values, the compiler, components, the batcher."""
