"""What a first picture's time goes into: the stages of ``max-diffusion generate``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Draws one picture, and prints the seconds of each stage as JSON."""
    wanted = json.loads(sys.argv[1])
    ends = {"python": time.time()}
    from max_diffusion import GenerationRequest
    from max_diffusion.media.writers import save_frames
    from max_diffusion.pipelines.families import pipeline_class
    from max_diffusion.pipelines.opening import open_model

    pipeline_class("FluxPipeline")
    ends["imports"] = time.time()
    pipeline = open_model(wanted["folder"], device="cpu", dtype=wanted["dtype"])
    request = GenerationRequest(
        prompts=(wanted["prompt"],), num_inference_steps=wanted["steps"], seed=0
    )
    pipeline.create_context(request)
    ends["open"] = time.time()
    pipeline.compile()
    ends["graphs and weights"] = time.time()
    result = pipeline.draw(request)
    drawn, report = time.time(), result.report
    ends["encode"] = drawn - report.denoise_seconds - report.decode_seconds
    ends["denoise"] = drawn - report.decode_seconds
    ends["decode"] = drawn
    save_frames(Path(wanted["output"]), result.frames[0], {}, result.fps)
    ends["write"] = time.time()
    before, stages = wanted["started"], {}
    for name, end in ends.items():
        stages[name], before = end - before, end
    print(json.dumps({"stages": stages, "compiled": report.compile_count}), flush=True)
    os._exit(0)  # as the command line ends


if __name__ == "__main__":
    main()
