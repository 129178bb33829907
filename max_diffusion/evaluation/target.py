"""What a cache is to reach, and what a setting has reached so far."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..report import plain
from .drawing import Setting


@dataclass(frozen=True)
class Target:
    """What a cache must reach; exactly one of these. The rest is made the best of.

    Raises:
        RequestError: None or several, or a value out of range.
    """

    psnr: float | None = None
    """dB against no cache that every picture has; the fastest such cache wins."""
    speedup: float | None = None
    """Times as fast as no cache, whole pictures; the most like wins."""
    seconds: float | None = None
    """Of a whole picture, at most; the most like wins."""

    def __post_init__(self) -> None:
        """Checks the values."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise RequestError(
                "target: expected one of psnr, speedup and seconds, got "
                f"{', '.join(given) or 'none'}"
            )
        [(name, value)] = given.items()
        least = 1.0 if name == "speedup" else 0.0
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least < value < math.inf:
            raise RequestError(
                f"target: {name} must be a number above {least:g}, got {value!r}"
            )

    def __str__(self) -> str:
        """In words."""
        if self.psnr is not None:
            return f"every picture at {self.psnr:g} dB or more"
        if self.speedup is not None:
            return f"{self.speedup:g} times as fast"
        return f"a picture in {self.seconds:g} s"


@dataclass
class Trial:
    """One setting, on as many prompts as it was drawn for."""

    setting: Setting
    psnrs: list[float] = field(default_factory=list)
    """dB, by prompt; infinite where pictures are equal."""
    seconds: list[float] = field(default_factory=list)
    """Whole pictures, by prompt."""
    speedups: list[float] = field(default_factory=list)
    """Times as fast as no cache, by prompt."""
    skipped: float = 0
    """Transformer passes that were not computed in full, all prompts."""
    given_up: str = ""
    """Why it was not drawn for all prompts, if it was not."""

    @property
    def worst_psnr(self) -> float:
        """Of the pictures so far, dB."""
        return min(self.psnrs)

    @property
    def speedup(self) -> float:
        """Median over the prompts so far."""
        return statistics.median(self.speedups)

    @property
    def median_seconds(self) -> float:
        """Over the prompts so far."""
        return statistics.median(self.seconds)

    @property
    def is_faster(self) -> bool:
        """Than no cache: by the clock, and because it skips something.

        One that computes every step has equal pictures, too, and by chance less time.
        """
        return self.skipped > 0 and self.speedup > 1

    def meets(self, target: Target) -> bool:
        """Whether it does so far."""
        if not self.is_faster:
            return False
        if target.psnr is not None:
            return self.worst_psnr >= target.psnr
        if target.speedup is not None:
            return self.speedup >= target.speedup
        assert target.seconds is not None
        return self.median_seconds <= target.seconds

    def rank(self, target: Target) -> tuple[bool, bool, float, float]:
        """Greater is better: those that meet the target first, nearest first."""
        is_met = self.meets(target)
        by_quality = (self.worst_psnr, self.speedup)
        by_speed = (self.speedup, self.worst_psnr)
        wants_speed = is_met == (target.psnr is not None)
        return (is_met, self.is_faster, *(by_speed if wants_speed else by_quality))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; equal pictures have no PSNR, ``None``."""
        found: dict[str, Any] = plain(
            {
                **self.setting.to_dict(),
                "worst_psnr": self.worst_psnr,
                "speedup": self.speedup,
                "median_seconds": self.median_seconds,
                "skipped": self.skipped,
                "psnrs": self.psnrs,
                "seconds": self.seconds,
                "given_up": self.given_up,
            }
        )
        return found
