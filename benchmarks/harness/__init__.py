"""Measures max_diffusion against what else could be used."""

from .measures import BenchResult, Measure
from .plan import GROUPS
from .report import check_targets, save_bench, update_readme
from .run import bench

__all__ = [
    "GROUPS",
    "BenchResult",
    "Measure",
    "bench",
    "check_targets",
    "save_bench",
    "update_readme",
]
