"""What a benchmark measures: figures by runtime, and what could not be run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from max_diffusion.core.report import plain

from .models import Size


@dataclass
class Measure:
    """One figure of every runtime; less is better, but of decibels."""

    group: str
    """Name of a :class:`Size`, ``cold`` or ``parts``."""
    name: str
    """What was measured."""
    unit: str
    """``ms``, ``s``, ``MiB``, ``%``, ``dB`` or ``steps``."""
    rounds: dict[str, list[float]] = field(default_factory=dict)
    """The values of all rounds, by runtime."""

    @property
    def medians(self) -> dict[str, float]:
        """The median over the rounds, by runtime."""
        return {name: statistics.median(v) for name, v in self.rounds.items()}


@dataclass(frozen=True)
class BenchResult:
    """What :func:`bench` measured."""

    is_quick: bool
    """Whether it was the quick form."""
    date: str
    """The day, in UTC: ``2026-01-31``."""
    rounds: int
    """Processes of each runtime, where a size has no smaller maximum."""
    groups: tuple[str, ...]
    """The groups of :data:`GROUPS` that were measured."""
    sizes: tuple[Size, ...]
    """The models that were drawn with."""
    measures: tuple[Measure, ...]
    """All figures."""
    not_run: Mapping[str, Mapping[str, str]]
    """Why a runtime, or a part of it, could not be run, by group and name."""
    versions: Mapping[str, Mapping[str, Mapping[str, str]]]
    """Versions of packages by group, runtime and package."""
    command: str
    """The command that measures the same again."""
    machine: Mapping[str, object]
    """Processor, cores, memory and system that it was measured on."""
    seconds: float
    """Seconds that the whole benchmark took."""

    def to_dict(self) -> dict[str, Any]:
        """The result in plain JSON types."""
        found: dict[str, Any] = plain(vars(self))
        for item, measure in zip(found["measures"], self.measures, strict=True):
            item["medians"] = plain(measure.medians)
        return found


@dataclass
class Collection:
    """What a benchmark has measured so far."""

    measures: dict[tuple[str, str], Measure] = field(default_factory=dict)
    """Figures by group and name."""
    not_run: dict[str, dict[str, str]] = field(default_factory=dict)
    """Why something could not be run, by group and name."""
    versions: dict[str, dict[str, Mapping[str, str]]] = field(default_factory=dict)
    """Versions of packages by group, runtime and package."""

    def add(self, group: str, name: str, unit: str, runtime: str, value: float) -> None:
        """Adds a runtime's value of one round."""
        measure = self.measures.setdefault((group, name), Measure(group, name, unit))
        measure.rounds.setdefault(runtime, []).append(value)

    def refuse(self, group: str, name: str, reason: object) -> None:
        """Notes why something could not be run."""
        self.not_run.setdefault(group, {})[name] = str(reason)
