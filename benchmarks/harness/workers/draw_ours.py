"""Pictures by max_diffusion."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from common import Picture, job, work

from max_diffusion import load_pipeline
from max_diffusion.caches import cache_from_options


def main() -> None:
    """Loads, draws, prints."""
    wanted = job()
    pipeline = load_pipeline(
        wanted["folder"],
        device="cpu",
        dtype=wanted["dtype"],
        caches=tuple(wanted["caches"]),
    )

    def draw(cache: dict[str, Any] | None, steps: int) -> Picture:
        ends: list[float] = []
        started = time.perf_counter()
        result = pipeline.generate(
            wanted["prompt"],
            seed=wanted["seed"],
            height=wanted["side"],
            width=wanted["side"],
            num_inference_steps=steps,
            cache=cache_from_options("none")
            if cache is None
            else cache_from_options(cache["name"], cache["options"]),
            on_step=lambda done, total: ends.append(time.perf_counter()),
        )
        seconds = time.perf_counter() - started
        # From end to end of steps, sampler included, as of the others.
        took = [1e3 * (end - begin) for begin, end in pairwise(ends)]
        is_full = [r.actions == ("compute",) for r in result.report.steps]
        return Picture(seconds, took, is_full)

    work(draw, ("max-diffusion", "max"), time.time())


if __name__ == "__main__":
    main()
