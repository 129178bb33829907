"""Compiling ahead: a model's graphs as files, also for machines that are not there."""

from .export import Export, Exported, export_graphs
from .job import Model

__all__ = ["Export", "Exported", "Model", "export_graphs"]
