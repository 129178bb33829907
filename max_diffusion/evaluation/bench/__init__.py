"""Measures max_diffusion against what else could be used."""

from .report import save_bench, update_readme
from .run import BenchResult, Measure, bench

__all__ = ["BenchResult", "Measure", "bench", "save_bench", "update_readme"]
