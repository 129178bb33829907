"""What a search for a cache found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.report import plain
from .comparison import Comparison
from .drawing import Setting
from .target import Target, Trial


@dataclass(frozen=True)
class TuningResult:
    """What :func:`tune` found: the winner, its validation and all trials."""

    target: Target
    """The target that was to be reached."""
    is_met: bool
    """Whether the winner reaches the target on the prompts that it was validated on."""
    winner: Setting
    """The best setting that meets the target, or the one that comes nearest to it."""
    validation: Comparison
    """Comparison of the winner, no cache and fewer steps in the same time, on the other
    prompts."""
    num_validated: int
    """Number of settings that were drawn for the other prompts; if there are several,
    the winner was chosen by these prompts too."""
    num_left: int
    """Number of further settings that meet the target on the prompts tuned on, but were
    not validated: the time was over, or five were."""
    trials: tuple[Trial, ...]
    """All settings that were tried, by rank: those drawn for all prompts first."""
    fewer_steps: tuple[Trial, ...]
    """What smaller numbers of steps reach without a cache, most steps first."""
    baseline_seconds: float
    """Seconds that a whole image takes without a cache: the median over prompts."""
    prompts: tuple[str, ...]
    """The prompts that were tuned on, each alone."""
    refused: Mapping[str, str]
    """Why the model cannot run each cache that was left out, by the cache's name."""
    is_finished: bool
    """Whether all neighbours of the best were tried before the time was over."""
    seconds: float
    """Wall time of the whole search in seconds, validation included."""
    machine: Mapping[str, object]
    """Processor, cores, memory and system of the machine that measured."""

    @property
    def target_words(self) -> str:
        """Words for the target, of pictures or of videos."""
        return self.target.words(is_video=self.validation.is_video)

    @property
    def others_words(self) -> str:
        """Words for the prompts that the winner was validated on."""
        count = len(self.validation.prompts)
        prompts = "prompt" if count == 1 else "prompts"
        if self.num_validated == 1:
            return f"{count} {prompts} that it was not chosen by"
        return (
            f"{count} other {prompts}, by which it was chosen among the best "
            f"{self.num_validated}"
        )

    @property
    def miss_words(self) -> str:
        """Words for what misses the target; only for results that miss it."""
        if self.num_left:
            return (
                f"no setting that was validated reaches {self.target_words}; "
                f"{self.num_left} more do on the prompts tuned on, a larger budget may "
                "validate them"
            )
        where = "" if self.is_finished else " tried before the time was over"
        return f"no setting{where} reaches {self.target_words}"

    @property
    def tuned_words(self) -> str:
        """Words for what the winner reached on the prompts tuned on."""
        trial = next(t for t in self.trials if t.setting == self.winner)
        decibels = self._worst_words(trial.worst_psnr)
        skipped = "" if trial.skipped else ", nothing skipped"
        return f"{decibels}, {trial.speedup:.2f} times as fast{skipped}"

    @property
    def nearest_words(self) -> str:
        """Words for what the winner reached on the other prompts."""
        row = self.validation.of_kind("cache")[0]
        decibels = self._worst_words(row.metric("psnr")[1])
        return (
            f"{decibels}, {row.speedup:.2f} times as fast, {row.median_seconds:.3g} s"
        )

    def _worst_words(self, worst: float) -> str:
        if math.isinf(worst):
            return f"equal {self.validation.noun}s"
        return f"{worst:.1f} dB at worst"

    def to_dict(self) -> dict[str, Any]:
        """Returns the result in JSON's types, without the images."""
        own: dict[str, Any] = plain(
            {
                name: value
                for name, value in vars(self).items()
                if name not in ("winner", "validation", "trials", "fewer_steps")
            }
        )
        return {
            **own,
            "winner": self.winner.to_dict(),
            "validation": self.validation.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "fewer_steps": [trial.to_dict() for trial in self.fewer_steps],
        }
