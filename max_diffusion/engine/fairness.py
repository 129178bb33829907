"""Whose turn it is: those that had the smallest share of the device go first."""

from __future__ import annotations

from collections.abc import Sequence

from ..denoising.loop import Denoising
from .job import Job


def share_of_a_newcomer(running: Sequence[Job]) -> float:
    """The share a request starts with: neither ahead of the others nor behind.

    It is treated as if it had run all along beside the one that had least.
    """
    return min((job.used for job in running), default=0.0)


def choose(running: Sequence[Job], max_samples: int) -> list[tuple[Job, Denoising]]:
    """Chooses who takes a step in this turn, and charges them for it.

    Args:
        running: All that hold a slot; those without a loop are passed over.
        max_samples: Most pictures in a turn; a request with more of its own goes alone.

    Returns:
        Those that had least of the device, as many as fit, in order of submission.
    """
    ready = [
        (job, job.denoising)
        for job in sorted(running, key=lambda job: (job.used, job.order))
        if job.denoising is not None
    ]
    chosen: list[tuple[Job, Denoising]] = []
    samples = 0
    for job, denoising in ready:
        if chosen and samples + denoising.batch > max_samples:
            break
        samples += denoising.batch
        chosen.append((job, denoising))
        work = denoising.image_tokens * denoising.batch * len(denoising.states)
        job.used += work / 2.0**job.options.priority
    # In one order, so that the same rows meet at the next graph.
    return sorted(chosen, key=lambda pair: pair[0].order)
