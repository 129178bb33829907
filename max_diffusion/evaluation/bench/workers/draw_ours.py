"""Pictures by max_diffusion."""

from __future__ import annotations

import time
from typing import Any

from common import Picture, job, work

from max_diffusion import load_pipeline
from max_diffusion.text_to_image import named_cache


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
        started = time.perf_counter()
        result = pipeline.generate(
            wanted["prompt"],
            seed=wanted["seed"],
            height=wanted["side"],
            width=wanted["side"],
            num_inference_steps=steps,
            cache=named_cache("none")
            if cache is None
            else named_cache(cache["name"], cache["options"]),
        )
        seconds = time.perf_counter() - started
        full: list[float] = []
        cached: list[float] = []
        for record in result.report.steps[1:]:
            is_full = record.actions == ("compute",)
            (full if is_full else cached).append(record.milliseconds)
        return Picture(seconds, full, cached)

    work(draw, ("max-diffusion", "max"), time.time())


if __name__ == "__main__":
    main()
