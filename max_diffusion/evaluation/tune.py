"""Finds the cache that meets a target of quality or speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ..core.loras import GivenLoras
from ..errors import RequestError
from ..pipelines.arguments import picture_inputs
from ..pipelines.text_to_image import TextToImagePipeline
from .calibration import PROMPTS as PLAIN_PROMPTS
from .compare import compare
from .comparison import Comparison
from .drawing import NO_OPTIONS, OnProgress, Scenes, as_keywords, scenes_of
from .judging import Judge, checked_judge
from .machine import machine
from .target import Target, Trial
from .tuning_result import TuningResult
from .tuning_search import Search

if TYPE_CHECKING:
    from ..media.pictures import PictureLike

_VALIDATED: Final = 5


def tune(
    pipeline: TextToImagePipeline,
    target: Target,
    *,
    prompts: Sequence[str] | None = None,
    validation_prompts: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    budget_seconds: float = 600.0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    image: PictureLike | Sequence[PictureLike] | None = None,
    mask: PictureLike | None = None,
    strength: float | None = None,
    loras: GivenLoras | None = None,
    options: Mapping[str, object] = NO_OPTIONS,
    judge: Judge | None = None,
    on_progress: OnProgress | None = None,
) -> TuningResult:
    """Searches methods and their options for the best that meets a target.

    From settings far apart to the neighbours of the best, until no neighbour is better
    or the time is over. Each setting is drawn prompt by prompt and given up as soon as
    it is beyond hope: an image or a frame is below the target already, or it is clearly
    slower than another that is not. The winner is drawn again for prompts that it was
    not chosen by, beside no cache and fewer steps; where it fails there the next best
    is.

    Args:
        pipeline: The pipeline that draws; only caches that it can run are tried.
        target: The target to be reached.
        prompts: Prompts to tune on; default four plain ones.
        validation_prompts: Prompts to validate on, none of ``prompts``; default further
            plain ones.
        methods: Names of caches to try; default all that the pipeline can run.
        budget_seconds: Seconds to search, above 0. No cache and a first setting are
            drawn in any case; what is validated in the end takes longer.
        num_inference_steps: Denoising steps; default the model's.
        guidance_scale: Input of a guidance-distilled model.
        height: Height of the images in pixels; default the model's.
        width: Width of the images in pixels; default the model's.
        seed: Seed of the first prompt's noise; each further prompt has the next.
        image: Picture that all prompts start from. See :func:`compare`, also for the
            next three.
        mask: What of it is drawn anew.
        strength: How much of the schedule is run from it.
        loras: LoRAs of the pipeline's ``adapters``.
        options: What only some models have, by name. See :func:`compare`.
        judge: Tells of the validated images whether they show their prompts; it has
            no say in what wins. See :func:`compare`.
        on_progress: Is told how far it is, see :data:`OnProgress`; what it raises ends
            the search.

    Returns:
        The winner with its validation, and all that was tried.

    Raises:
        RequestError: A value is missing, malformed or out of range, or there is no
            cache to try.
    """
    if not isinstance(target, Target):
        raise RequestError(
            f"tune: expected a Target, Target(psnr=30) say, got {target!r}"
        )
    if not isinstance(budget_seconds, int | float) or not budget_seconds > 0:
        raise RequestError(
            f"tune: budget_seconds must be a number above 0, got {budget_seconds!r}"
        )
    checked_judge("tune", judge)
    steps = num_inference_steps
    if steps is None:
        steps = pipeline.default_num_inference_steps
    half = len(PLAIN_PROMPTS) // 2
    own, others = PLAIN_PROMPTS[:half], PLAIN_PROMPTS[half:]
    inputs = picture_inputs(image, mask, strength)

    def make_scenes(texts: Sequence[str], seed: int) -> Scenes:
        return scenes_of(
            texts,
            steps,
            seed=seed,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            loras=loras,
            options=options,
            # Read once, whatever becomes of files meanwhile.
            **as_keywords(inputs),
        )

    scenes = make_scenes(own if prompts is None else prompts, seed)
    if validation_prompts is None:
        validation_prompts = [text for text in others if text not in scenes.prompts]
    unseen = make_scenes(validation_prompts, seed + len(scenes))
    seen = set(scenes.prompts) & set(unseen.prompts)
    if seen:
        raise RequestError(
            f"tune: {min(seen)!r} is to be tuned and validated on; give it once"
        )
    search = Search(pipeline, target, scenes, steps, budget_seconds, on_progress)
    refused = search.first_settings(methods)
    search.run()
    ranked = search.ranked()
    chosen: tuple[Trial, Comparison] | None = None
    is_met = False
    tried = 0
    meeting = sum(trial.meets(target) for trial in ranked)
    for trial in ranked[:_VALIDATED]:
        if chosen and not trial.meets(target):
            break
        tried += 1
        validation = compare(
            pipeline,
            unseen.prompts,
            [trial.setting.cache],
            num_inference_steps=steps,
            seed=seed + len(scenes),
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            loras=loras,
            options=options,
            **as_keywords(inputs),
            runs=2,
            judge=judge,
            on_progress=_relabelled(on_progress),
        )
        is_met = trial.meets(target) and _is_met(validation, target)
        if chosen is None or is_met or _nearer(validation, chosen[1], target):
            chosen = (trial, validation)
        if is_met or search.is_over():
            break
    assert chosen
    return TuningResult(
        target=target,
        is_met=is_met,
        winner=chosen[0].setting,
        validation=chosen[1],
        num_validated=tried,
        num_left=max(0, meeting - tried),
        trials=tuple(ranked + search.unfinished()),
        fewer_steps=tuple(search.fewer_steps),
        baseline_seconds=search.baseline_seconds,
        prompts=scenes.prompts,
        refused=refused,
        is_finished=search.is_finished,
        seconds=search.seconds,
        machine=machine(),
    )


def _is_met(validation: Comparison, target: Target) -> bool:
    """Returns whether the cache of a comparison reaches a target."""
    return _validated(validation).meets(target)


def _nearer(validation: Comparison, other: Comparison, target: Target) -> bool:
    """Returns whether a comparison's cache is nearer to a target than another's."""
    return _validated(validation).rank(target) > _validated(other).rank(target)


def _validated(validation: Comparison) -> Trial:
    [row] = validation.of_kind("cache")
    return Trial(
        row.setting,
        [score.psnr for score in row.scores],
        [row.median_seconds],
        [row.speedup],
        sum(r.total_passes - r.full_passes for r in row.reports),
    )


def _relabelled(on_progress: OnProgress | None) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda share, label: on_progress(share, f"validating {label}")
