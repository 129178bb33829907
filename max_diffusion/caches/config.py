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
"""Graphs that come and go together: the whole transformer; its blocks one by one; the
same with what their attention, or all their modules, gave; the forecasts."""

Ladders: TypeAlias = Mapping[str, tuple[Any, ...]]
"""Values to try, by option."""

THRESHOLDS: Final = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56)
"""Relative changes to try, for ladders."""


# Those of matplotlib that have an area.
_MARKERS: Final = "osDdv^<>pPhH8*X"


@dataclass(frozen=True)
class ChartStyle:
    """How a cache is drawn among others.

    Attributes:
        colour: ``#rrggbb``, which people with any colour vision tell from the others'.
        marker: One of matplotlib's markers.
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
"""Of caches that choose none."""


@dataclass(frozen=True)
class StateSizes:
    """Bytes of what a cache may keep of a request, each for its whole batch."""

    prediction: int
    """One prediction ``(B, S_img, C)``."""
    image: int
    """The image stream ``(B, S_img, D)``."""
    text: int
    """The text stream ``(B, S_txt, D)``."""
    modulated_input: int
    """What TeaCache compares."""
    modules: Mapping[str, int]
    """The outputs of all blocks' modules, by level."""
    branches: int = 1
    """2 with true guidance."""


@dataclass(frozen=True)
class AbstractCacheConfig(ABC):
    """The options of one caching method, and all that the package knows of the method.

    A subclass is a frozen dataclass whose fields, each with a default, are its options;
    the class attributes below say the rest. :func:`~max_diffusion.register_cache`
    makes it known by its name to the command line, the server and the evaluation.
    """

    name: ClassVar[str]
    """Lower-case letters, digits and hyphens; what the command line calls it."""
    summary: ClassVar[str]
    """One sentence for people who choose among caches."""
    style: ClassVar[ChartStyle] = OTHER_STYLE
    """How charts draw it."""
    signal_limit: ClassVar[str | None] = None
    """The option that decisions hold their signal against, if one does."""
    ladders: ClassVar[Ladders] = MappingProxyType({})
    """What :func:`~max_diffusion.evaluation.tune` climbs: options, each with values
    from careful to bold, more or less. The default is among them, but for options of
    :attr:`coarse`. A cache without ladders is not tuned."""
    coarse: ClassVar[Ladders] = MappingProxyType({})
    """The options that say most, with the few values that the search starts from;
    the others are at their defaults then."""

    @property
    @abstractmethod
    def graph_groups(self) -> tuple[GraphGroup, ...]:
        """Graphs that a pipeline must have been compiled with."""

    @abstractmethod
    def state_bytes(self, sizes: StateSizes) -> int:
        """Most bytes of state that a request holds on the device, of all branches."""

    @abstractmethod
    def create_cache(self, calibration: Calibration) -> AbstractCache:
        """The policy: what decides, and runs the steps.

        Args:
            calibration: What was measured of the model.

        Raises:
            RequestError: The model lacks a measurement, or it forbids this cache.
        """

    def required_steps(self, num_steps: int | None) -> frozenset[int]:
        """Steps, 0-based, that a run of ``num_steps`` computes whatever is decided.

        Raises:
            RequestError: A rule names a step beyond the run, or needs a number of steps
                and there is none.
        """
        return frozenset()

    def is_repetition(self) -> bool:
        """Whether other options of this method compute the very same.

        Such settings are not tried when tuning.
        """
        return False
