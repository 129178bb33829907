"""Pictures by OpenVINO GenAI, of a model that optimum-intel has exported."""

from __future__ import annotations

import time
from typing import Any

from common import Picture, job, work
from openvino_genai import TaylorSeerCacheConfig, Text2ImagePipeline


def main() -> None:
    """Loads, draws, prints."""
    wanted = job()
    precision = {"float32": "f32", "bfloat16": "bf16"}[wanted["dtype"]]
    settings = {"INFERENCE_PRECISION_HINT": precision}
    if wanted["compile_cache"]:
        settings["CACHE_DIR"] = wanted["compile_cache"]
    pipeline = Text2ImagePipeline(wanted["folder"], "CPU", **settings)

    def draw(cache: dict[str, Any] | None, steps: int) -> Picture:
        config = pipeline.get_generation_config()
        config.taylorseer_config = None  # by default it is on
        if cache is not None:
            assert cache["name"] == "taylorseer", cache
            taylorseer = TaylorSeerCacheConfig()
            taylorseer.cache_interval = cache["options"]["cache_interval"]
            taylorseer.disable_cache_before_step = cache["options"]["warmup_steps"]
            taylorseer.disable_cache_after_step = steps  # never
            config.taylorseer_config = taylorseer
        pipeline.set_generation_config(config)
        started = time.perf_counter()
        pipeline.generate(
            wanted["prompt"],
            height=wanted["side"],
            width=wanted["side"],
            num_inference_steps=steps,
            guidance_scale=3.5,
            max_sequence_length=wanted["text_tokens"],
            rng_seed=wanted["seed"],
        )
        seconds = time.perf_counter() - started
        metrics = pipeline.get_performance_metrics().raw_metrics
        took = [float(value) / 1e3 for value in metrics.iteration_durations]
        # It does not tell which steps ran the transformer, but a forecast takes a
        # thousandth of one, and the first two are never forecast.
        limit = 0.0 if cache is None else min(took[:2]) / 10
        return Picture(seconds, took[1:], [value > limit for value in took])

    work(draw, ("openvino-genai", "openvino"), time.time())


if __name__ == "__main__":
    main()
