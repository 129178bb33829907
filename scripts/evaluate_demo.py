"""Judges the demo model on prompts whose combinations it was never trained on.

Draws held-out scenes, generates a picture for each caption, and lets
``max_diffusion.demo`` find objects and relation in it.

    .venv/bin/python scripts/evaluate_demo.py --prompts 300 --output evaluation
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from demo_verdicts import captioned, counts, table
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track

from max_diffusion.demo import Scene, Verdict, check, held_out_scene

Draw = Callable[[list[str], int], np.ndarray]


def main() -> None:
    """Generates, checks, reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--cache", default="none")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--backend", choices=("max", "diffusers"), default="max")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((6, args.seed))
    scenes = [held_out_scene(rng) for _ in range(args.prompts)]
    draw = _max_backend(args) if args.backend == "max" else _diffusers_backend(args)
    pictures: list[np.ndarray] = []
    for start in track(range(0, len(scenes), args.batch), "drawing"):
        captions = [scene.caption for scene in scenes[start : start + args.batch]]
        pictures.extend(draw(captions, args.seed + start))
    verdicts = [check(p, s) for p, s in zip(pictures, scenes, strict=True)]
    summary = summarise(scenes, verdicts)
    Console().print(table(summary))
    _save_grid(args.output / "grid.png", pictures[:48], verdicts[:48])
    captions = [scene.caption for scene in scenes]
    captioned(pictures[:18], captions).save(args.output / "captioned.png")
    wrong = [i for i, verdict in enumerate(verdicts) if not verdict.is_right][:48]
    if wrong:
        chosen = [pictures[i] for i in wrong]
        _save_grid(args.output / "failures.png", chosen, [verdicts[i] for i in wrong])
    results = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "summary": summary,
        "pictures": [
            {"caption": s.caption, "is_right": v.is_right, "reason": v.reason}
            for s, v in zip(scenes, verdicts, strict=True)
        ],
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1))


def summarise(
    scenes: list[Scene], verdicts: list[Verdict]
) -> dict[str, dict[str, float]]:
    """Counts by number of objects, by relation, and in all."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for scene, verdict in zip(scenes, verdicts, strict=True):
        groups["all"].append(verdict)
        groups[f"{len(scene.objects)} objects"].append(verdict)
        groups[f"relation {scene.relation or 'none'}"].append(verdict)
    return counts(groups)


def _max_backend(args: argparse.Namespace) -> Draw:
    from max_diffusion import load_pipeline

    pipeline = load_pipeline(args.model)

    def draw(captions: list[str], seed: int) -> np.ndarray:
        return pipeline.generate(
            captions,
            seed=seed,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            cache=args.cache,
        ).images

    return draw


def _diffusers_backend(args: argparse.Namespace) -> Draw:
    """The same on torch, from a folder."""
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw(captions: list[str], seed: int) -> np.ndarray:
        pictures = pipeline(
            captions,
            height=128,
            width=128,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
        ).images
        return (np.asarray(pictures) * 255).round().astype(np.uint8)

    return draw


def _save_grid(path: Path, pictures: list[np.ndarray], verdicts: list[Verdict]) -> None:
    """Twelve a row; the frame is green where the checker agrees, else red."""
    columns, cell = 12, 136
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * cell, rows * cell), "white")
    pen = ImageDraw.Draw(grid)
    for index, (picture, verdict) in enumerate(zip(pictures, verdicts, strict=True)):
        x, y = index % columns * cell, index // columns * cell
        colour = "#2a9d4e" if verdict.is_right else "#d62828"
        pen.rectangle(
            (x + 1, y + 1, x + cell - 2, y + cell - 2), outline=colour, width=3
        )
        grid.paste(Image.fromarray(picture), (x + 4, y + 4))
    grid.save(path)


if __name__ == "__main__":
    main()
