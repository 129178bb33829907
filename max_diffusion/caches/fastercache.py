"""FasterCache: extrapolate attention, and estimate the unconditional branch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, final

import numpy as np
from max.driver import Buffer

from ..core.buffers import from_numpy, num_bytes, to_numpy
from ..core.grid import Grid
from ..core.validation import count, not_negative, ordered
from ..execution.graph_call import Routine
from .calibration import Calibration
from .config import ChartStyle, GraphGroup, Ladders, StateSizes
from .history import weighted_sum
from .kinds import AbstractModuleCache, ModuleState, Run
from .rules import StepRules


@dataclass(frozen=True)
class FasterCacheConfig(StepRules):
    """Options of FasterCache, beside those of :class:`StepRules`.

    Ranges are of timesteps, 1000 at pure noise, ends excluded. Defaults are diffusers'.
    All of guidance and frequencies is for true guidance only.

    Attributes:
        attention_interval: Within its range, steps whose index is a multiple of this
            compute attention. With true guidance, so do all that compute the
            unconditional branch.
        attention_min_timestep: Lower end of the range that extrapolates attention.
        attention_max_timestep: Upper end of that range.
        attention_weight: Weight of the extrapolation: attention is
            ``y1 + weight * (y1 - y2)`` of the last output ``y1`` and the one before it.
        guidance_interval: Within its range, steps whose index is a multiple of this
            compute the unconditional branch of true guidance; the others estimate it.
        guidance_min_timestep: Lower end of the range that estimates that branch.
        guidance_max_timestep: Upper end of that range.
        alpha_low: Factor on the low frequencies of the difference between branches,
            within their range; 1 outside of it.
        alpha_high: Factor on the high frequencies, within their range; 1 outside of it.
        low_min_timestep: Lower end of the range of ``alpha_low``.
        low_max_timestep: Upper end of the range of ``alpha_low``.
        high_min_timestep: Lower end of the range of ``alpha_high``.
        high_max_timestep: Upper end of the range of ``alpha_high``.
    """

    name: ClassVar[str] = "fastercache"
    summary: ClassVar[str] = (
        "Extrapolates attention from earlier steps, and estimates most passes of "
        "the negative prompt."
    )
    style: ClassVar[ChartStyle] = ChartStyle("#6b7384", "v")
    ladders: ClassVar[Ladders] = MappingProxyType(
        {
            "attention_interval": (2, 3, 4, 6, 8),
            "compute_last": (0, 1, 2, 4),
        }
    )
    coarse: ClassVar[Ladders] = MappingProxyType({"attention_interval": (2, 4)})
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("attention", "series")

    attention_interval: int = 2
    attention_min_timestep: float = -1.0
    attention_max_timestep: float = 681.0
    attention_weight: float = 0.5
    guidance_interval: int = 5
    guidance_min_timestep: float = -1.0
    guidance_max_timestep: float = 641.0
    alpha_low: float = 1.1
    alpha_high: float = 1.1
    low_min_timestep: float = 99.0
    low_max_timestep: float = 901.0
    high_min_timestep: float = -1.0
    high_max_timestep: float = 301.0

    def __post_init__(self) -> None:
        """Checks the range of each option."""
        super().__post_init__()
        count("fastercache: attention_interval", self.attention_interval, minimum=1)
        count("fastercache: guidance_interval", self.guidance_interval, minimum=1)
        for name in ("attention_weight", "alpha_low", "alpha_high"):
            not_negative(f"fastercache: {name}", vars(self)[name])
        for part in ("attention", "guidance", "low", "high"):
            ends = (vars(self)[f"{part}_{end}_timestep"] for end in ("min", "max"))
            ordered(f"fastercache: {part}", *ends)

    def estimated_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps that estimate the unconditional branch, if there is one."""
        low, high = self.guidance_min_timestep, self.guidance_max_timestep
        return frozenset(
            step
            for step, timestep in enumerate(run.timesteps_for("fastercache"))
            if run.has_guidance
            and low < timestep < high
            and step % self.guidance_interval
            and step not in run.required_steps
        )

    def extrapolated_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps that extrapolate the conditional branch's attention."""
        low, high = self.attention_min_timestep, self.attention_max_timestep
        estimated = self.estimated_steps(run)
        return frozenset(
            step
            for step, timestep in enumerate(run.timesteps_for("fastercache"))
            if low < timestep < high
            and step % self.attention_interval
            and step not in run.required_steps
            and (step in estimated or not run.has_guidance)
        )

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the most bytes of state that a request holds, over all branches."""
        difference = 2 * sizes.prediction if sizes.branches == 2 else 0
        return 2 * sizes.modules["attention"] + difference

    def create_cache(self, calibration: Calibration) -> FasterCache:
        """Creates the policy; needs no calibration."""
        return FasterCache(self)


@final
class FasterCache(AbstractModuleCache):
    """Extrapolates attention where its difference between steps is small.

    References:
        Lv et al., "FasterCache: Training-Free Video Diffusion Model Acceleration with
        High Quality", 2024, arXiv:2410.19355; rules and defaults are those of diffusers
        0.42. Differs: guidance branches may run in turn; the difference between them
        is weighted once, not again at each estimated step; frequencies are those of the
        grid of image tokens, unless the model says that they are of latent cells.
    """

    level = "attention"

    def __init__(self, config: FasterCacheConfig) -> None:
        self.config = config

    def create_state(self, run: Run) -> ModuleState:
        """Creates a branch's state; the unconditional branch's keeps no outputs.

        That branch is computed in full at every step where it runs.
        """
        if run.is_unconditional:
            return ModuleState(keeps_outputs=False)
        return ModuleState(self.config.extrapolated_steps(run))

    def skippable_steps(self, run: Run) -> frozenset[int]:
        """Returns the steps that extrapolate attention or estimate the other branch."""
        config = self.config
        planned = config.extrapolated_steps(run) | config.estimated_steps(run)
        return planned & run.later_steps

    def create_memory(self) -> LastTwo:
        """Creates the memory of a module's last two outputs."""
        return LastTwo(self.config.attention_weight)

    def decide(self, state: ModuleState, step: int) -> bool:
        """Returns whether the plan computes the step's attention."""
        return step not in state.plan

    def create_guidance(self, run: Run) -> BranchDifference | None:
        """Creates the estimate of the unconditional branch, if any step needs it."""
        estimated = self.config.estimated_steps(run)
        if not estimated:
            return None
        return BranchDifference(self.config, run, estimated)


@final
class LastTwo:
    """The last two outputs of a module, extrapolated ones among them, as published."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._last: tuple[Buffer, ...] = ()

    def push(self, value: Buffer, step: int) -> None:
        """Takes in an output ``(B, S, D)``; the first one counts twice."""
        self._last = (self._last[-1] if self._last else value, value)

    def forecast(self, step: int) -> Routine[Buffer]:
        """Returns ``y1 + weight * (y1 - y2)`` and takes it in as the latest output."""
        before, last = self._last
        value = yield from weighted_sum(
            [[1 + self._weight, -self._weight]], [last, before]
        )
        self.push(value, step)
        return value

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that both outputs take."""
        distinct = {id(value): value for value in self._last}
        return sum(num_bytes(value) for value in distinct.values())


@final
class BranchDifference:
    """Estimates the unconditional prediction from the conditional one.

    Belongs to one request. ``conditional + a low(d) + b high(d)`` with ``d`` the
    difference at the last step that computed both, its low frequencies those in a disk
    of a fifth of the smaller side of the grid, of image tokens or latent cells.
    """

    def __init__(
        self,
        config: FasterCacheConfig,
        run: Run,
        steps: frozenset[int],
    ) -> None:
        self._config, self.steps = config, steps
        self._timesteps = run.timesteps_for("fastercache")
        self._grid = run.grid_for("fastercache")
        self._low: Buffer | None = None
        self._high: Buffer | None = None

    def remember(self, conditional: Buffer, unconditional: Buffer) -> None:
        """Takes in the predictions ``(B, S_img, C)`` of a step that computed both."""
        difference = to_numpy(unconditional) - to_numpy(conditional)
        low = low_frequencies(difference, self._grid)
        dtype, device = conditional.dtype, conditional.device
        self._low = from_numpy(low, dtype, device)
        self._high = from_numpy(difference - low, dtype, device)

    def estimate(self, conditional: Buffer, step: int) -> Routine[Buffer]:
        """Estimates the unconditional prediction ``(B, S_img, C)`` of a step."""
        assert self._low is not None, "step 0 is never estimated"
        assert self._high is not None
        config, timestep = self._config, self._timesteps[step]
        is_low = config.low_min_timestep < timestep < config.low_max_timestep
        is_high = config.high_min_timestep < timestep < config.high_max_timestep
        factors = (
            1.0,
            config.alpha_low if is_low else 1.0,
            config.alpha_high if is_high else 1.0,
        )
        values = [conditional, self._low, self._high]
        return (yield from weighted_sum([factors], values))

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory that the difference's two parts take."""
        return sum(num_bytes(part) for part in (self._low, self._high) if part)


def low_frequencies(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Returns the part of ``(B, S, C)`` that varies slowly over each frame.

    Frequencies in a disk of radius ``min(rows, columns) // 5`` about zero, inclusive,
    of the latent cells that tokens hold, or of the tokens.
    """
    batch, _, channels = values.shape
    deep, high, wide = grid.cells
    rows, columns = grid.rows * high, grid.columns * wide
    # Tokens, each by channels and cells, to cells by their frame, row and column.
    tokens = batch * grid.frames, grid.rows, grid.columns, -1, deep, high, wide
    cells = values.reshape(tokens).transpose(0, 4, 1, 5, 2, 6, 3)
    whole = batch * grid.frames * deep, rows, columns, channels // (deep * high * wide)
    spectrum = np.fft.fft2(cells.reshape(whole), axes=(1, 2))
    y = np.fft.fftfreq(rows, 1 / rows)[:, None]
    x = np.fft.fftfreq(columns, 1 / columns)[None, :]
    disk = y**2 + x**2 <= (min(rows, columns) // 5) ** 2
    low = np.fft.ifft2(spectrum * disk[None, :, :, None], axes=(1, 2)).real
    back = low.reshape(cells.shape).transpose(0, 2, 4, 6, 1, 3, 5)
    return back.reshape(values.shape).astype(np.float32)
