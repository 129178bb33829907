"""The commands that judge caches: ``compare`` and ``tune``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..core.files import read_lines
from ..errors import MaxDiffusionError, RequestError
from .model import Command, add_model_options
from .terminal import Interruption, Progress

if TYPE_CHECKING:
    from ..caches import AbstractCacheConfig
    from ..evaluation import Comparison, Judge, TuningResult
    from ..evaluation.drawing import OnProgress
    from ..pipelines.text_to_image import TextToImagePipeline

_FILE_WIDTH = 160  # columns where there is no terminal to ask
_NAME_WIDTH = 24  # columns of a setting's name at least
# What a narrow terminal does not show, first to last; the page has it all.
_SPARED = (
    "cache state",
    "SSIM median",
    "LPIPS median",
    "first",
    "right",
    "PSNR median",
    "LPIPS worst",
    "SSIM worst",
    "full passes",
    "same time",
)


def _compare(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..caches import caches_from_text

    caches = None if args.caches in (None, "all") else caches_from_text(args.caches)
    fewer = _whole_numbers("--fewer-steps", args.fewer_steps)
    prompts = _prompts(args.prompts, args.prompts_file)
    if prompts is None:
        raise RequestError("compare: expected prompts, or a --prompts-file")
    from ..core.files import check_folder
    from ..core.validation import whole
    from ..evaluation import Lpips, compare, save_comparison
    from ..evaluation.drawing import runnable_caches, scenes_of

    # Loading and compiling take minutes: a slip is told before.
    scenes = scenes_of(prompts, **_drawn(args))
    whole("--runs", args.runs, minimum=1, maximum=1000)
    lpips = None if args.lpips is None else Lpips(args.lpips)
    folder = check_folder(args.output)

    def check(pipeline: TextToImagePipeline) -> None:
        steps = args.steps or pipeline.default_num_inference_steps
        for count in fewer:
            whole("--fewer-steps", count, minimum=1, maximum=steps - 1)
        runnable_caches(pipeline, caches, steps)
        for request in scenes.requests:
            pipeline.create_context(request)

    with _loaded(args, caches, "comparing", interruption, check) as (
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
            judge=_judge_of(model),
            on_progress=on_progress,
            **_drawn(args),
        )
    files = save_comparison(comparison, folder)
    if args.json:
        print(json.dumps({"files": [*map(str, files)], **comparison.to_dict()}))
        return
    _print_comparison(comparison)
    print(f"\n{files[0]}: open it in a browser")


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
    prompts = _prompts(args.prompts, args.prompts_file)
    unseen = _prompts([], args.validation_file)
    # As much as can be told before loading and compiling, which take minutes.
    if not args.budget > 0:
        raise RequestError(f"--budget: expected seconds above 0, got {args.budget:g}")
    scenes = scenes_of((*(prompts or ()), *(unseen or ())) or ("",), **_drawn(args))
    folder = check_folder(args.output)

    def check(pipeline: TextToImagePipeline) -> None:
        for request in scenes.requests:
            pipeline.create_context(request)

    with _loaded(args, methods, "tuning", interruption, check) as (model, on_progress):
        prompts, unseen = _prompts_of(model, prompts, unseen)
        result = tune(
            model,
            target,
            prompts=prompts,
            validation_prompts=unseen,
            methods=methods,
            budget_seconds=args.budget,
            judge=_judge_of(model),
            on_progress=on_progress,
            **_drawn(args),
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


def _drawn(args: argparse.Namespace) -> dict[str, Any]:
    """How every picture is drawn, by the names that Python has for it."""
    return {
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "guidance_scale": args.guidance,
        "height": args.height,
        "width": args.width,
    }


@contextmanager
def _loaded(
    args: argparse.Namespace,
    caches: Sequence[str | AbstractCacheConfig] | None,
    word: str,
    interruption: Interruption,
    check: Callable[[TextToImagePipeline], None],
) -> Iterator[tuple[TextToImagePipeline, OnProgress]]:
    """The model with what the caches need, by default with what all do; and progress.

    ``check`` sees the opened model before its compile, which takes minutes. Progress is
    shown, and heeds Ctrl-C, until the end of the block.
    """
    from ..caches import CACHES
    from ..pipelines.registry import open_model

    with ExitStack() as stack:
        progress = Progress(stack, is_shown=sys.stderr.isatty(), word=word)
        pipeline = open_model(
            args.model,
            device=args.device,
            dtype=args.dtype,
            caches=tuple(CACHES) if caches is None else ("none", *caches),
            calibration=args.calibration,
            variant=args.variant,
            revision=args.revision,
            show_progress=sys.stderr.isatty(),
            on_event=progress.on_event,
        )
        check(pipeline)
        pipeline.compile()
        interruption.check()
        yield pipeline, _teller(progress, interruption)


def _judge_of(pipeline: TextToImagePipeline) -> Judge | None:
    """Who tells whether the model's images show their prompts, if anyone can."""
    from ..demo import judge
    from ..pipelines.registry import is_demo_model

    return judge if is_demo_model(pipeline.pipeline_config.path) else None


def _prompts_of(
    pipeline: TextToImagePipeline,
    prompts: tuple[str, ...] | None,
    unseen: tuple[str, ...] | None,
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """What to tune and to validate on: as given, else the model's own if it has any.

    The demo model's are combinations that it was never trained on; ``None`` leaves the
    choice to :func:`tune`.
    """
    from ..demo import held_out_prompts
    from ..pipelines.registry import is_demo_model

    if not is_demo_model(pipeline.pipeline_config.path):
        return prompts, unseen
    texts = held_out_prompts(12)
    prompts = prompts or texts[:6]
    return prompts, unseen or tuple(t for t in texts[6:] if t not in prompts)


def _teller(progress: Progress, interruption: Interruption) -> OnProgress:
    """Shows how far it is, and stops where the user wants it."""

    def tell(share: float, what: str) -> None:
        progress.on_share(share, what)
        interruption.check()

    return tell


def _prompts(given: Sequence[str], file: str | None) -> tuple[str, ...] | None:
    """Prompts of the command line, or of a file, one a line."""
    if file is None:
        return tuple(given) or None
    if given:
        raise RequestError("--prompts-file: give prompts there or as words, not both")
    try:
        lines = read_lines(Path(file))
    except OSError as err:
        raise RequestError(f"{file} cannot be read ({err.strerror})") from err
    except UnicodeDecodeError as err:
        raise RequestError(f"{file} is no UTF-8 text; write one prompt a line") from err
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise RequestError(f"{file} holds no prompt; write one a line")
    return prompts


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


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

    from ..evaluation.comparison_report import summary_table

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
    for name, reason in comparison.refused.items():
        print(f"{name} was not run: {reason}")


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """Columns that a table takes on a terminal.

    Long names of settings go on in a next line.
    """
    widths = {n: max(map(len, (n, *cells))) for n, cells in columns.items()}
    widths[""] = min(widths[""], _NAME_WIDTH)
    return 1 + sum(3 + width for width in widths.values())


def _print_tuning(result: TuningResult, files: Sequence[Path]) -> None:
    print(f"{len(result.trials)} settings tried in {result.seconds:.0f} s")
    if result.is_met:
        print(
            f"{files[0]}: {result.winner.label}, on {result.others_words}: "
            f"{result.nearest_words}"
        )
    print(f"{files[1]}: open it in a browser")


def _add_common_options(add: Callable[..., Any]) -> None:
    add("--model", default="demo", help="demo, a diffusers folder or a hub repo id")
    add("--prompts-file", metavar="FILE", help="prompts, one a line")
    add("--steps", type=int, help="denoising steps; default: the model's")
    add("--guidance", type=float, help="guidance scale of distilled models, 3.5")
    add(
        "--seed", type=int, default=0, help="of the first prompt; the next has the next"
    )
    add("--calibration", metavar="FILE", help="measurements instead of the model's")
    add_model_options(add)


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
    _add_common_options(add)


def _add_tune_options(add: Callable[..., Any]) -> None:
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="to tune on; default: some plain ones",
    )
    add("--target-psnr", type=float, metavar="DB", help="every picture's; then speed")
    add("--target-speedup", type=float, metavar="N", help="times as fast; then quality")
    add("--max-seconds", type=float, metavar="S", help="of a picture; then quality")
    add("--caches", metavar="NAMES", help="to try; default: all the model can run")
    add("--budget", type=float, default=600.0, metavar="S", help="seconds to search")
    add("--validation-file", metavar="FILE", help="other prompts, one a line")
    add("-o", "--output", default="tuning", metavar="FOLDER", help="%(default)s")
    _add_common_options(add)


EVALUATION_COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "compare": Command(
            "draw with caches, without, and with fewer steps: a page and a table",
            _add_compare_options,
            _compare,
        ),
        "tune": Command(
            "find the cache for a quality or a speed, and write it to a file",
            _add_tune_options,
            _tune,
        ),
    }
)
