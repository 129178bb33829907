"""The example's family with frames; whoever uses it registers it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import new_model
import numpy as np
from folders import TEST_GRAPHS
from max.driver import Buffer
from new_model import ToyPipeline

from max_diffusion import (
    CACHES,
    Frames,
    GenerationContext,
    RequestOptions,
    load_pipeline,
    option,
    register_model,
)
from max_diffusion.pipelines import families
from max_diffusion.pipelines.decoding import DecodesInParts


@dataclass(frozen=True)
class ToyVideoOptions(RequestOptions):
    num_frames: int | None = option("frames of a video", minimum=1, maximum=9)
    fps: float | None = option(
        "frames a second", minimum=1.0, maximum=60.0, needs="frames"
    )
    is_even: bool | None = option("of no effect but with guidance", needs="guidance")


class ToyVideoPipeline(DecodesInParts, ToyPipeline):
    """The same gray in every frame, a token a 2 x 2 pixels of each."""

    options_class = ToyVideoOptions

    def frames_of(self, options: RequestOptions) -> Frames:
        assert isinstance(options, ToyVideoOptions)
        count = 3 if options.num_frames is None else options.num_frames
        return Frames(count, count, 8.0 if options.fps is None else options.fps)

    def resolved_options(self, context: GenerationContext) -> dict[str, object]:
        return {"num_frames": context.num_frames, "fps": context.fps}

    def decode_parts(
        self, context: GenerationContext, latents: Buffer
    ) -> Iterator[np.ndarray]:
        grid = context.grid
        assert grid.frames == context.num_frames
        cells = latents.to_numpy().reshape(
            -1, grid.frames, grid.rows, grid.columns, 2, 2, 3
        )
        shape = -1, context.num_frames, context.height, context.width, 3
        pixels = cells.transpose(0, 1, 2, 4, 3, 5, 6).reshape(shape)
        frames = np.clip(pixels.round(), 0, 255).astype(np.uint8)
        for start in range(0, context.num_frames, 2):
            yield frames[:, start : start + 2]


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Known for a while only: its options would be all servers', too."""
    register_model("ToyVideoPipeline", ToyVideoPipeline)
    try:
        yield
    finally:
        del families._kinds["ToyVideoPipeline"]


def load(folder: Path) -> ToyVideoPipeline:
    """With the graphs of every cache; registered by whoever calls it."""
    found = load_pipeline(
        folder,
        device="cpu",
        caches=tuple(CACHES),
        precompiled=[TEST_GRAPHS / "toy"],
    )
    assert isinstance(found, ToyVideoPipeline)
    return found


def write_folder(path: Path) -> Path:
    new_model.write_folder(path)
    index = json.loads((path / "model_index.json").read_text())
    index["_class_name"] = "ToyVideoPipeline"
    (path / "model_index.json").write_text(json.dumps(index))
    return path
