"""Measures max_diffusion against what else could be used."""

from .report import check_targets, save_bench, update_readme
from .run import GROUPS, BenchResult, Measure, bench

__all__ = [
    "GROUPS",
    "BenchResult",
    "Measure",
    "bench",
    "check_targets",
    "save_bench",
    "update_readme",
]
