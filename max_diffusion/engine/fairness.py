"""Whose turn it is: those that had the smallest share of the device go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..denoising.loop import Denoising
from .job import Job

_ALIKE: Final = 4
"""Times the smallest step: up to here all step together, as what a turn does in common
is worth more than the wait for the largest."""


def start_beside(running: Sequence[Job], newcomer: Job) -> None:
    """Gives a request that starts what it needs to be neither ahead nor behind.

    It is treated as if it had run all along beside the one that had least.
    """
    newcomer.used = min((job.used for job in running), default=0.0)
    newcomer.work = min((job.work for job in running), default=0.0)


def choose(running: Sequence[Job], max_samples: int) -> list[tuple[Job, Denoising]]:
    """Chooses who takes a step in this turn, and charges them for it.

    What takes far larger steps than others passes turns over until they have had as
    much: beside a video a picture has half of the device, and not a step for each of
    the video's.

    Args:
        running: All that hold a slot; those without a loop are passed over.
        max_samples: Most pictures in a turn; a request with more of its own goes alone.

    Returns:
        Those that had least of the device, as many as fit, in order of submission.
    """
    ready = [
        (job, job.denoising, _work(job.denoising))
        for job in sorted(running, key=lambda job: (job.used, job.order))
        if job.denoising is not None
    ]
    least = min((job.work for job, _, _ in ready), default=0.0)
    smallest = min((work for _, _, work in ready), default=0.0)
    # What large steps of each size may have had: equal ones are one batch, so whoever
    # is not a whole step ahead of one whose turn it is joins it.
    bounds: dict[float, float] = {}
    for job, _, work in ready:
        if job.work < least + smallest:
            bounds[work] = max(bounds.get(work, 0.0), job.work + work)
    chosen: list[tuple[Job, Denoising]] = []
    samples = 0
    for job, denoising, work in ready:
        if work > _ALIKE * smallest and job.work >= bounds.get(work, 0.0):
            continue
        if chosen and samples + denoising.batch > max_samples:
            break
        samples += denoising.batch
        chosen.append((job, denoising))
        job.work += work
        job.used += work / 2.0**job.options.priority
    # In one order, so that the same rows meet at the next graph.
    return sorted(chosen, key=lambda pair: pair[0].order)


def _work(denoising: Denoising) -> float:
    """What a step takes of the device: samples x tokens x branches."""
    return denoising.image_tokens * denoising.batch * len(denoising.states)
