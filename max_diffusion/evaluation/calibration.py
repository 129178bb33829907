"""Measures a model for the caches that decide from measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, final

import numpy as np
from max.driver import Buffer

from ..caches import (
    AbstractCacheConfig,
    AbstractResidualCache,
    Calibration,
    GraphGroup,
    MagCacheConfig,
    ResidualState,
    Run,
    StateSizes,
)
from ..core.buffers import to_numpy
from ..core.loras import GivenLoras, as_loras
from ..core.noise import checked_seed
from ..core.request import GenerationContext, GenerationRequest
from ..core.validation import count
from ..errors import MaxDiffusionError, RequestError
from ..execution.graph_call import Routine
from ..pipelines import OnStep
from ..pipelines.arguments import picture_inputs
from .drawing import NO_OPTIONS

if TYPE_CHECKING:
    from ..media.pictures import PictureLike
    from ..pipelines.text_to_image import TextToImagePipeline

PROMPTS: Final = (
    "a red circle above a blue square",
    "a large yellow star on a navy background",
    "a green heart left of an orange diamond on a gray background",
    "a white triangle inside a purple circle on a mint background",
    "a cyan square, a pink heart and a black star in a row",
    "two green stars on a gray background",
    "a small orange triangle below a white circle",
    "a purple diamond",
)
"""Prompts to measure with, plain enough for any text-to-image model."""
_MAX_DEGREE: Final = 4
_EPSILON: Final = 1e-8


def calibration_requests(
    prompts: str | Sequence[str] = PROMPTS,
    *,
    num_inference_steps: int | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    image: PictureLike | Sequence[PictureLike] | None = None,
    mask: PictureLike | None = None,
    strength: float | None = None,
    loras: GivenLoras | None = None,
    options: Mapping[str, object] = NO_OPTIONS,
) -> list[GenerationRequest]:
    """Returns the requests that :func:`calibrate` will draw.

    They are checked as far as no model is needed.

    Raises:
        RequestError: No prompts, too few steps, or a value out of range.
    """
    texts = (prompts,) if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts:
        raise RequestError(f"calibrate: expected at least one prompt, got {prompts!r}")
    if num_inference_steps is not None:
        count("calibrate: num_inference_steps", num_inference_steps, minimum=2)
    first = checked_seed(seed)
    inputs = picture_inputs(image, mask, strength)
    chosen = as_loras("loras", loras)
    return [
        GenerationRequest(
            prompts=(text,),
            num_inference_steps=num_inference_steps,
            seed=first + index,
            height=height,
            width=width,
            inputs=inputs,
            loras=chosen,
            options=options,
            cache=RecorderConfig(),
        )
        for index, text in enumerate(texts)
    ]


def check_whole(context: GenerationContext) -> None:
    """Refuses to measure a part of a run, as it would be taken for a whole one.

    Raises:
        RequestError: A picture takes the place of the first steps.
    """
    if context.strength is not None and context.strength < 1:
        raise RequestError(
            f"calibrate: strength must be 1, got {context.strength:g}, as asked for or "
            "by default: whole runs are measured, and a run from a picture takes the "
            "end of these ratios; give strength 1, or leave the image out"
        )


def calibrate(
    pipeline: TextToImagePipeline,
    prompts: str | Sequence[str] = PROMPTS,
    *,
    num_inference_steps: int | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    image: PictureLike | Sequence[PictureLike] | None = None,
    mask: PictureLike | None = None,
    strength: float | None = None,
    loras: GivenLoras | None = None,
    options: Mapping[str, object] = NO_OPTIONS,
    on_step: OnStep | None = None,
) -> Calibration:
    """Draws images or videos without a cache and measures how their residuals change.

    For MagCache, the mean over tokens, guidance branches and prompts of
    ``|r_s| / (|r_(s-1)| + 1e-8)``, ``r_s`` what all blocks add to the image stream at
    step ``s``, as its authors and diffusers measure. For TeaCache, a polynomial, see
    :func:`fit`, from the relative change of the modulated input to that of the
    residual, which is what is reused; its authors fit the change of the prediction.

    Args:
        pipeline: Pipeline compiled for ``magcache`` or another cache of single blocks.
        prompts: Prompts to draw one image or video each for.
        num_inference_steps: Denoising steps of each; at least 2; default the model's.
            Ratios are resampled to other numbers of steps.
        seed: Seed of the first prompt's noise; each further prompt has the next.
        height: Height of the images in pixels; default the model's.
        width: Width of the images in pixels; default the model's.
        image: Picture that all prompts start from, of models that read one; several
            for models that take them.
        mask: What of it is drawn anew.
        strength: How much of the schedule is run from it: 1, as whole runs are
            measured. Where only the end of a run is left, caches take the end of these
            measurements.
        loras: LoRAs of those that the pipeline was given as ``adapters``, by name. What
            is returned says which these, and those merged at load, were: requests with
            others are warned.
        options: What only some models have, by the names that the model's
            ``options_class`` declares: ``num_frames`` of CogVideoX.
        on_step: Called with ``(steps done, steps)`` of all prompts; what it raises
            ends the measurement.

    Raises:
        RequestError: No prompts, a size the model cannot draw, a strength below 1, or
            a pipeline without the graphs it takes.
    """
    steps = num_inference_steps
    if steps is None:
        steps = pipeline.default_num_inference_steps
    requests = calibration_requests(
        prompts,
        num_inference_steps=steps,
        seed=seed,
        height=height,
        width=width,
        image=image,
        mask=mask,
        strength=strength,
        loras=loras,
        options=options,
    )
    # Says by name what the pipeline must be compiled for.
    pipeline.caches.bind(MagCacheConfig(ratios=(1.0,)), steps)
    total = steps * len(requests)
    ratios: list[list[float]] = []
    inputs: list[float] = []
    residuals: list[float] = []
    for index, request in enumerate(requests):
        context = pipeline.create_context(request)
        check_whole(context)
        recorder = context.cache.policy
        assert isinstance(recorder, Recorder)

        def on_own_step(done: int, _: int, index: int = index) -> None:
            if on_step is not None:
                on_step(steps * index + done, total)

        output = pipeline.execute(pipeline.prepare_inputs(context), on_step=on_own_step)
        for name, branch in recorder.branches.items():
            ratios.append(branch.ratios)
            residuals += branch.changes
            inputs += [
                record.signal[0]
                for record in output.steps
                if record.signal and record.branch == name
            ]
    if not np.isfinite([*np.ravel(ratios), *inputs, *residuals]).all():
        raise MaxDiffusionError(
            "calibrate: a residual of this model is zero or not finite, so its change "
            "cannot be measured; try other prompts, or float32"
        )
    coefficients, r2 = fit(np.array(inputs), np.array(residuals))
    return Calibration(
        num_inference_steps=steps,
        num_images=len(requests),
        magcache_ratios=(1.0, *(float(x) for x in np.mean(ratios, axis=0))),
        teacache_coefficients=coefficients,
        teacache_r2=r2,
        teacache_range=(min(inputs), max(inputs)),
        loras=pipeline.pipeline_config.loras_with(context.loras),
    )


def fit(inputs: np.ndarray, outputs: np.ndarray) -> tuple[tuple[float, ...], float]:
    """Fits the polynomial of degree 1 to 4 that predicts best, and its predictive R².

    Each point is judged by a fit to all others, so that a curve through a handful of
    points, or one that bends after the last of them, explains nothing. TeaCache's
    authors take degree 4 and fit once.

    Returns:
        Coefficients, highest power first, and R²: 0 with too few points to judge.
    """
    best: tuple[tuple[float, ...], float] = ((float(np.mean(outputs)),), 0.0)
    spread = float(np.square(outputs - outputs.mean()).sum())
    for degree in range(1, _MAX_DEGREE + 1):
        if len(np.unique(inputs)) <= degree + 1 or spread == 0:
            break
        coefficients = np.polyfit(inputs, outputs, degree)
        rest = outputs - np.polyval(coefficients, inputs)
        # A point's share in its own fitted value: the diagonal of the projection.
        scaled = (inputs - inputs.mean()) / np.ptp(inputs)
        basis, _ = np.linalg.qr(np.vander(scaled, degree + 1))
        share = np.square(basis).sum(axis=1)
        if (share > 1 - 1e-9).any():
            break
        r2 = 1 - float(np.square(rest / (1 - share)).sum()) / spread
        if r2 > best[1]:
            best = tuple(float(x) for x in coefficients), r2
    return best


@final
@dataclass(frozen=True)
class RecorderConfig(AbstractCacheConfig):
    """A cache that computes every step, and records how residuals change."""

    name: ClassVar[str] = "calibrate"
    summary: ClassVar[str] = "Computes every step and measures it."
    graph_groups: ClassVar[tuple[GraphGroup, ...]] = ("blocks", "series")

    def state_bytes(self, sizes: StateSizes) -> int:
        """Returns the bytes of the signal; residuals are kept on the host."""
        return sizes.modulated_input

    def create_cache(self, calibration: Calibration) -> Recorder:
        """Creates the policy, which records one request."""
        return Recorder()


@final
class Recorder(AbstractResidualCache):
    """Computes every step of one request, and records how residuals change."""

    signal = "modulated_input"
    compares_neighbours = True

    def __init__(self) -> None:
        self.branches: dict[str, RecordingTail] = {}
        """What was recorded of each guidance branch, by the name in its records."""

    def create_state(self, run: Run) -> ResidualState:
        """Creates the state of one guidance branch."""
        name = "unconditional" if run.is_unconditional else "conditional"
        tail = self.branches[name] = RecordingTail()
        return ResidualState(tail)

    def decide(self, state: ResidualState, step: int, change: np.ndarray) -> np.ndarray:
        """Returns True for all samples; never asked, as the tail is always empty."""
        return np.ones(change.shape, bool)


@final
class RecordingTail:
    """Compares each residual of one branch with the one before, and forgets it."""

    is_empty = True

    def __init__(self) -> None:
        self.ratios: list[float] = []
        """Size of the residual over that of the step before: the mean over tokens, one
        value per step from step 1 on."""
        self.changes: list[float] = []
        """Relative change of the residual, one value per step from step 1 on."""
        self._before: np.ndarray | None = None

    def push(self, value: Buffer, step: int, rows: Sequence[int] | None = None) -> None:
        """Records the change from the residual before to ``value``, ``(1, S, D)``."""
        now = to_numpy(value).astype(np.float64)[0]
        before = self._before
        if before is not None:
            sizes = (np.linalg.norm(x, axis=-1) for x in (now, before))
            size, size_before = sizes
            self.ratios.append(float((size / (size_before + _EPSILON)).mean()))
            change = np.abs(now - before).mean() / np.abs(before).mean()
            self.changes.append(float(change))
        self._before = now

    def forecast(self, step: int) -> Routine[Buffer]:
        """Raises AssertionError: every step computes, so nothing is forecast."""
        raise AssertionError("a recorder computes every step")

    def clear(self) -> None:
        """Forgets the last residual."""
        self._before = None

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory held: 0, as residuals are on the host."""
        return 0
