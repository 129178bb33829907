"""``max-diffusion compare``: caches side by side with none, and with fewer steps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import RequestError
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
    from ..evaluation import Comparison
    from ..pipelines.text_to_image import TextToImagePipeline

_FILE_WIDTH: Final = 160  # columns where there is no terminal to ask
_NAME_WIDTH: Final = 24  # columns of a setting's name at least
# What a narrow terminal does not show, first to last; the page has it all.
_SPARED: Final = (
    "cache state",
    "SSIM mean",
    "LPIPS mean",
    "SSIM median",
    "LPIPS median",
    "first",
    "right",
    "flicker median",
    "PSNR median",
    "LPIPS worst",
    "SSIM worst",
    "full passes",
    "PSNR mean",
    "flicker worst",
    "same time",
)


def _compare(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..caches import caches_from_text

    caches = None if args.caches in (None, "all") else caches_from_text(args.caches)
    fewer = _whole_numbers("--fewer-steps", args.fewer_steps)
    prompts = read_prompts(args.prompts, args.prompts_file)
    if prompts is None:
        raise RequestError("compare: expected prompts, or a --prompts-file")
    from ..core.files import check_folder
    from ..core.validation import whole
    from ..evaluation import Lpips, compare, save_comparison
    from ..evaluation.drawing import runnable_caches, scenes_of

    # Loading and compiling take minutes: a slip is told before.
    drawn = drawn_alike(args)
    scenes = scenes_of(prompts, **drawn)
    whole("--runs", args.runs, minimum=1, maximum=1000)
    lpips = None if args.lpips is None else Lpips(args.lpips)
    folder = check_folder(args.output)

    def check(pipeline: TextToImagePipeline) -> None:
        steps = args.num_inference_steps or pipeline.default_num_inference_steps
        for count in fewer:
            whole("--fewer-steps", count, minimum=1, maximum=steps - 1)
        check_requests(pipeline, scenes.requests)
        runnable_caches(pipeline, caches, scenes.steps_run(pipeline, steps))

    with loaded_model(args, caches, "comparing", interruption, check) as (
        model,
        on_progress,
    ):
        comparison = compare(
            model,
            prompts,
            caches,
            fewer_steps=fewer,
            runs=args.runs,
            lpips=lpips,
            judge=judge_of(model),
            on_progress=on_progress,
            **drawn,
        )
    files = save_comparison(comparison, folder)
    if args.json:
        print(json.dumps({"files": [*map(str, files)], **comparison.to_dict()}))
        return
    _print_comparison(comparison)
    print(f"\n{files[0]}: open it in a browser")


def _whole_numbers(option: str, text: str | None) -> tuple[int, ...]:
    try:
        return (
            tuple(int(number) for number in text.split(",")) if text is not None else ()
        )
    except ValueError as err:
        raise RequestError(
            f"{option}: expected whole numbers separated by commas, got {text!r}"
        ) from err


def _print_comparison(comparison: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.comparison_report import metrics_words, summary_table

    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    columns = dict(summary_table(comparison))
    left_out = [name for name in _SPARED if name in columns]
    shown = dict(columns)
    while left_out and _width(shown) > console.width:
        del shown[left_out.pop(0)]
    table = Table()
    for name in shown:
        is_label = not name
        table.add_column(
            name,
            justify="left" if is_label else "right",
            min_width=_NAME_WIDTH // 2 if is_label else None,
            overflow="fold",
            no_wrap=not is_label,
        )
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*cells)
    console.print(table)
    hidden = [name for name in columns if name not in shown]
    if hidden:
        print(f"not shown for want of room: {', '.join(hidden)}")
    if words := metrics_words(comparison):
        print(words)
    for name, reason in comparison.refused.items():
        print(f"{name} was not run: {reason}")


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """Returns how many columns of a terminal a table takes.

    Long names of settings go on in a next line.
    """
    widths = {n: max(map(len, (n, *cells))) for n, cells in columns.items()}
    widths[""] = min(widths[""], _NAME_WIDTH)
    return 1 + sum(3 + width for width in widths.values())


def _add_compare_options(add: Callable[..., Any]) -> None:
    add("prompts", nargs="*", metavar="PROMPT", help="each is drawn alone")
    add(
        "--caches",
        metavar="LIST",
        help="NAME or NAME:KEY=VALUE:KEY=VALUE, separated by commas; default: all that "
        "the model can run",
    )
    add("-o", "--output", default="comparison", metavar="FOLDER", help="%(default)s")
    add("--runs", type=int, default=3, help="how often each picture is timed")
    add("--fewer-steps", metavar="N,N", help="also draw so many without a cache")
    add("--lpips", metavar="FILE.onnx", help="network that tells pictures' distance")
    add_evaluation_options(add)


COMPARE: Final = Command(
    "draw with caches, without, and with fewer steps: a page and a table",
    _add_compare_options,
    _compare,
    takes_cache_options=True,
    takes_model_options=True,
)
