"""The same picture by OpenVINO GenAI, from shell to PNG."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Draws one picture, and prints the seconds of each stage as JSON."""
    wanted = json.loads(sys.argv[1])
    ends = {"python": time.time()}
    from openvino_genai import Text2ImagePipeline
    from PIL import Image

    ends["imports"] = time.time()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "CACHE_DIR": wanted["compile_cache"]}
    pipeline = Text2ImagePipeline(wanted["folder"], "CPU", **settings)
    config = pipeline.get_generation_config()
    config.taylorseer_config = None  # by default it is on
    pipeline.set_generation_config(config)
    ends["graphs and weights"] = time.time()
    images = pipeline.generate(
        wanted["prompt"],
        height=wanted["side"],
        width=wanted["side"],
        num_inference_steps=wanted["steps"],
        guidance_scale=3.5,
        max_sequence_length=wanted["text_tokens"],
        rng_seed=0,
    )
    ends["picture"] = time.time()
    Image.fromarray(images.data[0]).save(wanted["output"])
    ends["write"] = time.time()
    before, stages = wanted["started"], {}
    for name, end in ends.items():
        stages[name], before = end - before, end
    print(json.dumps({"stages": stages}), flush=True)


if __name__ == "__main__":
    main()
