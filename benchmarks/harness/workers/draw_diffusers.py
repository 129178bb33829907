"""Pictures by diffusers on torch; caches are diffusers' own."""

from __future__ import annotations

import time
import warnings
from itertools import pairwise
from typing import Any

from common import Picture, job, work

warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import torch  # noqa: E402

diffusers.logging.set_verbosity_error()


def main() -> None:
    """Loads, draws, prints."""
    wanted = job()
    pipeline = diffusers.FluxPipeline.from_pretrained(
        wanted["folder"], torch_dtype=getattr(torch, wanted["dtype"])
    )
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    if wanted["is_compiled"]:
        transformer.compile()
    ends: list[float] = []
    calls = [0]
    full: list[bool] = []

    def on_step_end(_: Any, step: int, timestep: Any, values: Any) -> Any:
        ends.append(time.perf_counter())
        full.append(wanted["is_compiled"] or calls[0] > 0)
        calls[0] = 0
        return values

    if not wanted["is_compiled"]:  # compiled, a hook would break the graph
        # Reached only where no cache stands in for it.
        probe = transformer.single_transformer_blocks[-1].attn.to_q
        probe.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def draw(cache: dict[str, Any] | None, steps: int) -> Picture:
        ends.clear()
        full.clear()
        if cache is not None:
            transformer.enable_cache(cache_config(cache, pipeline, steps))
        started = time.perf_counter()
        try:
            pipeline(
                wanted["prompt"],
                height=wanted["side"],
                width=wanted["side"],
                num_inference_steps=steps,
                guidance_scale=3.5,
                max_sequence_length=pipeline.tokenizer_2.model_max_length,
                generator=torch.Generator("cpu").manual_seed(wanted["seed"]),
                callback_on_step_end=on_step_end,
            )
        finally:
            if cache is not None:
                transformer.disable_cache()
        seconds = time.perf_counter() - started
        took = [1e3 * (end - begin) for begin, end in pairwise(ends)]
        return Picture(seconds, took, list(full))

    with torch.inference_mode():
        work(draw, ("diffusers", "torch"), time.time())


def cache_config(cache: dict[str, Any], pipeline: Any, steps: int) -> Any:
    """Diffusers' configuration for our names and settings."""
    options = cache["options"]
    name = cache["name"]
    if name == "taylorseer":
        return diffusers.TaylorSeerCacheConfig(
            cache_interval=options["cache_interval"],
            disable_cache_before_step=options["warmup_steps"],
            max_order=1,
            taylor_factors_dtype=pipeline.dtype,
            use_lite_mode=True,  # the prediction, as ours
        )
    if name == "first-block":
        return diffusers.FirstBlockCacheConfig(threshold=options["threshold"])
    if name == "magcache":
        return diffusers.MagCacheConfig(
            num_inference_steps=steps, mag_ratios=torch.tensor(cache["ratios"])
        )

    def current_timestep() -> Any:
        return pipeline.current_timestep

    if name == "pab":
        return diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=options["interval"],
            current_timestep_callback=current_timestep,
        )
    assert name == "fastercache", name
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=options["attention_interval"],
        is_guidance_distilled=True,
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        current_timestep_callback=current_timestep,
    )


if __name__ == "__main__":
    main()
