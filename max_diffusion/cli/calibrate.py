"""``max-diffusion calibrate``: measures what some caches need to know of a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..core.setting_names import flags
from ..errors import RequestError
from .command import (
    Command,
    add_loading_options,
    add_lora_option,
    add_picture_options,
    add_running_options,
    merged_loras,
    model_options,
    source_of,
    starting_pictures,
)
from .terminal import Interruption, Progress

if TYPE_CHECKING:
    from ..caches import Calibration


def _calibrate(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..caches import CALIBRATION_FILE, Calibration
    from ..evaluation.calibration import (
        PROMPTS,
        calibrate,
        calibration_requests,
        check_whole,
    )
    from ..evaluation.drawing import as_keywords, noun_of
    from ..media.images import check_writable
    from ..pipelines.opening import open_folder, open_model

    is_shown = sys.stderr.isatty()
    prompts = args.prompts or PROMPTS
    loras = merged_loras(args)
    settings: dict[str, Any] = {
        "num_inference_steps": args.num_inference_steps,
        "seed": args.seed,
        "height": args.height,
        "width": args.width,
        "options": model_options(args),
        **as_keywords(starting_pictures(args)),
    }
    # Loading and compiling take minutes: a slip is told before.
    requests = calibration_requests(prompts, **settings)
    other = "--transformer" if args.transformer is not None else "--lora"
    if args.output is None and (args.transformer is not None or loras):
        raise RequestError(
            f"--output: with {other} it must be given; the model's own "
            "measurements are of its own transformer"
        )
    if args.output is None:
        folder, kind = open_folder(
            args.model,
            variant=args.variant,
            revision=args.revision,
            show_progress=is_shown,
        )
        if args.image and not kind.needs_pictures:
            raise RequestError(
                "--output: with --image it must be given, since this model also draws "
                "from text alone; its own measurements are of that"
            )
        output = folder.path / CALIBRATION_FILE
    else:
        output = Path(args.output)
    check_writable(output, "--output", ".json")
    with ExitStack() as stack:
        progress = Progress(stack, is_shown=is_shown, word="measuring")
        pipeline = open_model(
            args.model,
            device=args.device,
            dtype=args.dtype,
            caches=("none", "magcache"),
            calibration=Calibration(),  # not the model's own: it may be damaged
            loras=loras,
            **source_of(args),
            precompiled=args.precompiled,
            require_precompiled=args.require_precompiled,
            threads=args.threads,
            offload_text_encoders=args.offload_text_encoders,
            show_progress=is_shown,
            on_event=progress.on_event,
        )
        contexts = [pipeline.create_context(request) for request in requests]
        if args.image:
            for context in contexts:
                check_whole(context)
        pipeline.compile()
        if args.image:
            pipeline.graphs.require_pictures()

        def on_step(done: int, total: int) -> None:
            progress.on_step(done, total)
            interruption.check()

        interruption.check()
        result = calibrate(pipeline, prompts, **settings, on_step=on_step)
    if args.output is None and output.is_symlink():
        output.unlink()  # leads into the hub's cache, to a file named by its contents
    result.write(output)
    if args.json:
        print(json.dumps({"file": str(output), **asdict(result)}))
        return
    print(f"{output}: {_summary(result, noun_of(contexts[0].num_frames))}")


def _summary(result: Calibration, noun: str) -> str:
    from ..caches.teacache import MIN_R2

    ratios = result.magcache_ratios[1:]
    verdict = "" if result.teacache_r2 >= MIN_R2 else ", too little, so it is refused"
    return (
        f"{result.num_images} {noun}s of {result.num_inference_steps} steps; "
        f"magcache ratios {min(ratios):.3f} to {max(ratios):.3f}; teacache's fit "
        f"explains R² {result.teacache_r2:.2f}{verdict}"
    )


def _add_calibrate_options(add: Callable[..., Any]) -> None:
    add("prompts", nargs="*", metavar="PROMPT", help="default: eight plain ones")
    add(
        "--model",
        default="demo",
        help="demo, demo-video, a diffusers folder or a hub repo id",
    )
    add(
        "--output",
        metavar="FILE.json",
        help="default: in the model's folder",
    )
    add(
        *flags("num_inference_steps"),
        dest="num_inference_steps",
        type=int,
        metavar="N",
        help="denoising steps of each picture; default: the model's",
    )
    add("--seed", type=int, default=0, help="of the first picture")
    add_picture_options(add)
    add_lora_option(add)
    add_loading_options(add)
    add_running_options(add)


CALIBRATE: Final = Command(
    "measure what magcache and teacache need to know of a model",
    _add_calibrate_options,
    _calibrate,
    takes_model_options=True,
)
