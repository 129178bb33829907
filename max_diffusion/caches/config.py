"""What every cache's configuration declares of itself."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias

from ..errors import RequestError

if TYPE_CHECKING:
    from .calibration import Calibration
    from .kinds import AbstractCache

GraphGroup = Literal["full", "blocks", "attention", "modules", "series"]
"""Name of a set of graphs that are compiled together: the whole transformer; its blocks
one by one; its blocks with known outputs of their attention, or of all their modules;
the forecasts."""

Ladders: TypeAlias = Mapping[str, tuple[Any, ...]]
"""Values to try when tuning, by the option's name."""

THRESHOLDS: Final = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56)
"""Relative changes that ladders of thresholds try, in increasing order."""


# Those of matplotlib that have an area.
_MARKERS: Final = "osDdv^<>pPhH8*X"


@dataclass(frozen=True)
class ChartStyle:
    """The colour and mark with which charts draw one cache among others.

    Attributes:
        colour: Colour as ``#rrggbb``, which people with any colour vision tell from the
            others'.
        marker: One of matplotlib's markers for points.
    """

    colour: str
    marker: str

    def __post_init__(self) -> None:
        """Refuses what matplotlib could not draw, long before it is asked to."""
        if not re.fullmatch("#[0-9a-f]{6}", self.colour):
            raise RequestError(
                "ChartStyle: colour must be six lower-case hexadecimal digits after a "
                f"#, got {self.colour!r}"
            )
        if len(self.marker) != 1 or self.marker not in _MARKERS:
            raise RequestError(
                f"ChartStyle: marker must be one of {_MARKERS}, got {self.marker!r}"
            )


OTHER_STYLE: Final = ChartStyle("#3d4451", "X")
"""Style of caches that choose none of their own."""


@dataclass(frozen=True)
class StateSizes:
    """Bytes of each value that a cache may keep, for a request's whole batch."""

    prediction: int
    """Bytes of one prediction ``(B, S_img, C)``."""
    image: int
    """Bytes of the image stream ``(B, S_img, D)``."""
    text: int
    """Bytes of the text stream ``(B, S_txt, D)``."""
    modulated_input: int
    """Bytes of the first block's modulated input, which TeaCache compares."""
    modules: Mapping[str, int]
    """Bytes of the outputs of all blocks' modules, by level: ``attention`` or
    ``modules``."""
    branches: int = 1
    """Number of guidance branches: 2 with true guidance, else 1."""


@dataclass(frozen=True)
class AbstractCacheConfig(ABC):
    """Base of each caching method's options, and all that is known of the method.

    A subclass is a frozen dataclass whose fields, each with a default, are its options;
    the class attributes below say the rest. :func:`~max_diffusion.register_cache`
    makes it known by its name to the command line, the server and the evaluation.
    """

    name: ClassVar[str]
    """Name of the cache on the command line: lower-case letters, digits and hyphens."""
    summary: ClassVar[str]
    """One sentence about the cache for people who choose among caches."""
    style: ClassVar[ChartStyle] = OTHER_STYLE
    """How charts draw the cache."""
    signal_limit: ClassVar[str | None] = None
    """Name of the option that decisions compare their signal with, ``None`` if there is
    none."""
    ladders: ClassVar[Ladders] = MappingProxyType({})
    """Options that :func:`~max_diffusion.evaluation.tune` varies, each with values from
    careful to bold, more or less. The default is among them, but for options of
    :attr:`coarse`. A cache without ladders is not tuned."""
    coarse: ClassVar[Ladders] = MappingProxyType({})
    """Options that matter most, with the few values that the search starts from while
    the other options are at their defaults."""

    @property
    @abstractmethod
    def graph_groups(self) -> tuple[GraphGroup, ...]:
        """Graphs that a pipeline must have compiled to run this cache."""

    @abstractmethod
    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of device memory that a request's state takes.

        Counts all guidance branches.
        """

    @abstractmethod
    def create_cache(self, calibration: Calibration) -> AbstractCache:
        """Creates the policy, which decides what each step computes and runs it.

        Args:
            calibration: Measurements of the model.

        Raises:
            RequestError: The model lacks a measurement, or it forbids this cache.
        """

    def required_steps(self, num_steps: int | None) -> frozenset[int]:
        """Returns the 0-based steps that a run of ``num_steps`` always computes.

        Raises:
            RequestError: A rule names a step beyond the run, or needs a number of steps
                and there is none.
        """
        return frozenset()

    def is_repetition(self) -> bool:
        """Returns whether other options of this method compute the very same.

        Such settings are not tried when tuning.
        """
        return False
