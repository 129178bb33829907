"""Judges the video demo model on prompts whose combinations it was never trained on.

Draws held-out clips, generates a video for each caption, and lets
``max_diffusion.demo`` follow the shapes in it.

    .venv/bin/python scripts/evaluate_video_demo.py --output judged
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from demo_verdicts import captioned, counts, table
from PIL import Image
from rich.console import Console
from rich.progress import track

from max_diffusion import load_pipeline
from max_diffusion.demo import Clip, Verdict, check_clip, held_out_clip


def main() -> None:
    """Generates, checks, reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="demo-video")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--cache", default="none")
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((6, args.seed))
    clips = [held_out_clip(rng) for _ in range(args.prompts)]
    pipeline = load_pipeline(args.model)
    videos: list[np.ndarray] = []
    for start in track(range(0, len(clips), args.batch), "drawing"):
        result = pipeline.generate(
            [clip.caption for clip in clips[start : start + args.batch]],
            seed=args.seed + start,
            num_inference_steps=args.steps,
            true_cfg_scale=args.guidance,
            cache=args.cache,
        )
        videos.extend(result.frames)
    pairs = list(zip(videos, clips, strict=True))
    verdicts = [check_clip(video, clip) for video, clip in track(pairs, "judging")]
    summary = summarise(clips, verdicts)
    Console().print(table(summary))
    _save_strips(args.output / "strips.png", videos[:24])
    captions = [clip.caption for clip in clips]
    _save_captioned(args.output / "captioned.webp", videos[:12], captions)
    wrong = [i for i, verdict in enumerate(verdicts) if not verdict.is_right][:24]
    if wrong:
        _save_strips(args.output / "failures.png", [videos[i] for i in wrong])
    results = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "summary": summary,
        "videos": [
            {"caption": caption, "is_right": v.is_right, "reason": v.reason}
            for caption, v in zip(captions, verdicts, strict=True)
        ],
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1))


def summarise(
    clips: list[Clip], verdicts: list[Verdict]
) -> dict[str, dict[str, float]]:
    """Counts by number of objects, by motion, and in all."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for clip, verdict in zip(clips, verdicts, strict=True):
        groups["all"].append(verdict)
        groups[f"{len(clip.objects)} objects"].append(verdict)
        for motion in {item.motion for item in clip.objects}:
            groups[f"motion {motion}"].append(verdict)
    return counts(groups)


def _save_captioned(path: Path, videos: list[np.ndarray], captions: list[str]) -> None:
    """The first videos, right or wrong, twice as large, side by side and moving."""
    frames = [
        captioned(
            [frame.repeat(2, axis=0).repeat(2, axis=1) for frame in now], captions
        )
        for now in zip(*videos, strict=True)
    ]
    first, *rest = frames
    # At the eight frames a second of CogVideoX; the last stays to be seen.
    pause = [125] * len(rest) + [1000]
    first.save(
        path, save_all=True, append_images=rest, duration=pause, loop=0, quality=85
    )


def _save_strips(path: Path, videos: list[np.ndarray]) -> None:
    """Every fourth frame of each video, one video a row, twice as large."""
    rows = [np.concatenate(list(video[::4]), axis=1) for video in videos]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(
        path
    )


if __name__ == "__main__":
    main()
