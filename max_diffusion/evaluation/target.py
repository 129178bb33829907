"""What a cache is to reach, and what a setting has reached so far."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from ..core.report import plain
from ..errors import RequestError
from .drawing import Setting


@dataclass(frozen=True)
class Target:
    """What a cache must reach: exactly one of these values. The rest is optimised.

    Raises:
        RequestError: None or several, or a value out of range.
    """

    psnr: float | None = None
    """PSNR in dB, against no cache, that every image, of videos every frame, must have;
    the fastest such cache wins."""
    speedup: float | None = None
    """How many times as fast as no cache whole images must be drawn; the cache with
    the most like images wins."""
    seconds: float | None = None
    """Seconds that a whole image or video may take; the cache with the most like images
    wins."""

    def __post_init__(self) -> None:
        """Checks that one value is given, and that it is in range."""
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
        """Returns the target of pictures in words."""
        return self.words(is_video=False)

    def words(self, *, is_video: bool) -> str:
        """Returns the target of pictures or of videos in words."""
        if self.psnr is not None:
            what = "frame" if is_video else "picture"
            return f"every {what} at {self.psnr:g} dB or more"
        if self.speedup is not None:
            return f"{self.speedup:g} times as fast"
        return f"a {'video' if is_video else 'picture'} in {self.seconds:g} s"


@dataclass
class Trial:
    """What one setting has reached, on as many prompts as it was drawn for."""

    setting: Setting
    """The cache and the number of steps."""
    psnrs: list[float] = field(default_factory=list)
    """PSNR in dB by prompt, against no cache, of videos the worst frame's; infinite
    where images or videos are equal."""
    seconds: list[float] = field(default_factory=list)
    """Seconds that whole images took, by prompt."""
    speedups: list[float] = field(default_factory=list)
    """How many times as fast as no cache the images were drawn, by prompt."""
    skipped: float = 0
    """Number of transformer passes not computed in full, over all prompts."""
    given_up: str = ""
    """Why the setting was not drawn for all prompts; empty where it was."""

    @property
    def worst_psnr(self) -> float:
        """Lowest PSNR of the images or frames so far, in dB."""
        return min(self.psnrs)

    @property
    def speedup(self) -> float:
        """How many times as fast as no cache: the median over the prompts so far."""
        return statistics.median(self.speedups)

    @property
    def median_seconds(self) -> float:
        """Seconds that a whole image takes: the median over the prompts so far."""
        return statistics.median(self.seconds)

    @property
    def is_faster(self) -> bool:
        """Whether the setting beats no cache by the clock because it skips something.

        A setting that computes every step has equal images, and by chance less time.
        """
        return self.skipped > 0 and self.speedup > 1

    def meets(self, target: Target) -> bool:
        """Returns whether the setting reaches a target on the prompts so far."""
        if not self.is_faster:
            return False
        if target.psnr is not None:
            return self.worst_psnr >= target.psnr
        if target.speedup is not None:
            return self.speedup >= target.speedup
        assert target.seconds is not None
        return self.median_seconds <= target.seconds

    def rank(self, target: Target) -> tuple[bool, bool, float, float]:
        """Returns a key that is greater the better the setting is for a target.

        Settings that meet the target come first, then those that come nearest to it.
        """
        is_met = self.meets(target)
        by_quality = (self.worst_psnr, self.speedup)
        by_speed = (self.speedup, self.worst_psnr)
        wants_speed = is_met == (target.psnr is not None)
        return (is_met, self.is_faster, *(by_speed if wants_speed else by_quality))

    def to_dict(self) -> dict[str, Any]:
        """Returns the trial in JSON's types; the PSNR of equal images is ``None``."""
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
