"""``max-diffusion tune``: the fastest cache of a quality, or the best of a speed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import MaxDiffusionError, RequestError
from .command import Command
from .evaluating import (
    add_evaluation_options,
    check_requests,
    drawn_alike,
    judge_of,
    loaded_model,
    read_prompts,
)
from .terminal import Interruption

if TYPE_CHECKING:
    from ..evaluation import TuningResult
    from ..pipelines.text_to_image import TextToImagePipeline


def _tune(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..core.files import check_folder
    from ..evaluation import Target, save_tuning, tune
    from ..evaluation.drawing import scenes_of
    from ..evaluation.search_space import coarse

    targets = (args.target_psnr, args.target_speedup, args.max_seconds)
    count = sum(value is not None for value in targets)
    if count != 1:
        raise RequestError(
            "tune: expected one of --target-psnr, --target-speedup and --max-seconds, "
            f"got {count or 'none'}"
        )
    target = Target(*targets)
    methods = None if args.caches in (None, "all") else _names(args.caches)
    for name in methods or ():
        coarse(name)  # raises if there is none
    prompts = read_prompts(args.prompts, args.prompts_file)
    unseen = read_prompts([], args.validation_file, "--validation-file")
    # As much as can be told before loading and compiling, which take minutes.
    if not args.budget > 0:
        raise RequestError(f"--budget: expected seconds above 0, got {args.budget:g}")
    drawn = drawn_alike(args)
    scenes = scenes_of((*(prompts or ()), *(unseen or ())) or ("",), **drawn)
    folder = check_folder(args.output)

    def check(pipeline: TextToImagePipeline) -> None:
        check_requests(pipeline, scenes.requests)

    with loaded_model(args, methods, "tuning", interruption, check) as (
        model,
        on_progress,
    ):
        prompts, unseen = _prompts_of(model, prompts, unseen)
        result = tune(
            model,
            target,
            prompts=prompts,
            validation_prompts=unseen,
            methods=methods,
            budget_seconds=args.budget,
            judge=judge_of(model),
            on_progress=on_progress,
            **drawn,
        )
    files = save_tuning(result, folder)
    if args.json:
        print(json.dumps({"files": [*map(str, files)], **result.to_dict()}))
    else:
        _print_tuning(result, files)
    if not result.is_met:
        raise MaxDiffusionError(
            f"tune: {result.miss_words}; the nearest, {result.winner.label}, "
            f"has {result.tuned_words} on the prompts tuned on and "
            f"{result.nearest_words} on other prompts, and is in {files[0]}"
        )


def _prompts_of(
    pipeline: TextToImagePipeline,
    prompts: tuple[str, ...] | None,
    unseen: tuple[str, ...] | None,
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Returns what to tune and to validate on: as given, else the model's own.

    A demo model's are combinations that it was never trained on; ``None`` leaves the
    choice to :func:`tune`.
    """
    from ..demo import held_out_clip_prompts, held_out_prompts
    from ..pipelines.opening import demo_model_name

    name = demo_model_name(pipeline.pipeline_config.path)
    if name is None:
        return prompts, unseen
    texts = (held_out_prompts if name == "demo" else held_out_clip_prompts)(12)
    prompts = prompts or texts[:6]
    return prompts, unseen or tuple(t for t in texts[6:] if t not in prompts)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _print_tuning(result: TuningResult, files: Sequence[Path]) -> None:
    print(
        f"{len(result.trials)} settings tried, and the best of them validated, in "
        f"{result.seconds:.0f} s"
    )
    if result.is_met:
        print(
            f"{files[0]}: {result.winner.label}, on {result.others_words}: "
            f"{result.nearest_words}"
        )
    print(f"{files[1]}: open it in a browser")


def _add_tune_options(add: Callable[..., Any]) -> None:
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="to tune on; default: some plain ones",
    )
    add(
        "--target-psnr",
        type=float,
        metavar="DB",
        help="every picture's, or frame's of videos; then speed",
    )
    add("--target-speedup", type=float, metavar="N", help="times as fast; then quality")
    add("--max-seconds", type=float, metavar="S", help="of a picture; then quality")
    add("--caches", metavar="NAMES", help="to try; default: all the model can run")
    add("--budget", type=float, default=600.0, metavar="S", help="seconds to search")
    add("--validation-file", metavar="FILE", help="other prompts, one a line")
    add("-o", "--output", default="tuning", metavar="FOLDER", help="%(default)s")
    add_evaluation_options(add)


TUNE: Final = Command(
    "find the cache for a quality or a speed, and write it to a file",
    _add_tune_options,
    _tune,
    takes_model_options=True,
)
