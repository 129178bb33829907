"""The commands about a model: what it can do, and what its caches need measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .terminal import Interruption, Progress

if TYPE_CHECKING:
    from ..caches import Calibration
    from ..pipelines.inspection import ModelReport


# Columns where there is no terminal to ask.
_FILE_WIDTH = 140


@dataclass(frozen=True)
class Command:
    """One command: its help line, its options, and what it does."""

    help: str
    add_options: Callable[[Callable[..., Any]], None]
    run: Callable[[argparse.Namespace, Interruption], None]


def _inspect(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..pipelines.inspection import inspect

    report = inspect(
        args.model,
        height=args.height,
        width=args.width,
        batch=args.batch,
        true_guidance=args.true_guidance,
        device=args.device,
        dtype=args.dtype,
        calibration=args.calibration,
        variant=args.variant,
        revision=args.revision,
        show_progress=sys.stderr.isatty(),
    )
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        _print_report(report)


def _print_report(report: ModelReport) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..caches.rules import StepRules

    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    weights = Table("component", "parameters", "in files", f"as {report.dtype}")
    weights.title = f"{report.model}: {report.pipeline}"
    for name, part in report.components.items():
        sizes = (_size(part.stored_bytes), _size(part.used_bytes))
        weights.add_row(name, f"{part.parameters:,}", *sizes)
    caches = Table("cache", "supported", "state", "options")
    caches.title = (
        f"state of {report.batch} pictures of {report.image_tokens} image and "
        f"{report.text_tokens} text tokens"
        + (", with true guidance" if report.branches == 2 else "")
    )
    off = {
        item.name: item.default for item in fields(StepRules)
    }  # of all caches: told once, in the documentation
    for name, cache in report.caches.items():
        options = (
            f"{key}={value}"
            for key, value in cache.options.items()
            if key not in off or value != off[key]
        )
        caches.add_row(
            name,
            cache.reason or "yes",
            _size(cache.state_bytes),
            " ".join(options),
        )
    console.print(weights)
    console.print(caches)


def _size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _calibrate(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..caches import CALIBRATION_FILE, Calibration
    from ..evaluation.calibration import PROMPTS, calibrate, calibration_requests
    from ..media.images import check_writable
    from ..pipelines.registry import open_folder, open_model

    is_shown = sys.stderr.isatty()
    prompts = args.prompts or PROMPTS
    settings = {
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "height": args.height,
        "width": args.width,
    }
    # Loading and compiling take minutes: a slip is told before.
    requests = calibration_requests(prompts, **settings)
    if args.output is None:
        folder, _ = open_folder(
            args.model,
            variant=args.variant,
            revision=args.revision,
            show_progress=is_shown,
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
            variant=args.variant,
            revision=args.revision,
            show_progress=is_shown,
            on_event=progress.on_event,
        )
        for request in requests:
            pipeline.create_context(request)
        pipeline.compile()

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
    print(f"{output}: {_summary(result)}")


def _summary(result: Calibration) -> str:
    from ..caches.teacache import MIN_R2

    ratios = result.magcache_ratios[1:]
    verdict = "" if result.teacache_r2 >= MIN_R2 else ", too little, so it is refused"
    return (
        f"{result.num_pictures} pictures of {result.num_inference_steps} steps; "
        f"magcache ratios {min(ratios):.3f} to {max(ratios):.3f}; teacache's fit "
        f"explains R² {result.teacache_r2:.2f}{verdict}"
    )


def add_model_options(add: Callable[..., Any]) -> None:
    """Add the options that say how a model is loaded.

    Args:
        add: A parser's `add_argument`.
    """
    add("--variant", help="weight files' variant, for example fp16")
    add("--revision", help="branch, tag or commit of a model of the hub")
    add("--height", type=int, help="pixels; default: the model's")
    add("--width", type=int, help="pixels; default: the model's")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:INDEX")
    add("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    add("--json", action="store_true", help="print the result as JSON")
    add("--debug", action="store_true", help="show tracebacks of errors")


def _add_inspect_options(add: Callable[..., Any]) -> None:
    words = "demo, a diffusers folder or a hub repo id"
    add("model", nargs="?", default="demo", metavar="MODEL", help=words)
    add("--batch", type=int, default=1, help="pictures at once")
    add("--true-guidance", action="store_true", help="with a second pass a step")
    add("--calibration", metavar="FILE", help="measurements instead of the model's")
    add_model_options(add)


def _add_calibrate_options(add: Callable[..., Any]) -> None:
    add("prompts", nargs="*", metavar="PROMPT", help="default: eight plain ones")
    add("--model", default="demo", help="demo, a diffusers folder or a hub repo id")
    add(
        "--output",
        metavar="FILE.json",
        help="default: in the model's folder",
    )
    add(
        "--steps",
        type=int,
        help="denoising steps of each picture; default: the model's",
    )
    add("--seed", type=int, default=0, help="of the first picture")
    add_model_options(add)


MODEL_COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "inspect": Command(
            "tell a model's weights, and what each cache would do and take",
            _add_inspect_options,
            _inspect,
        ),
        "calibrate": Command(
            "measure what magcache and teacache need to know of a model",
            _add_calibrate_options,
            _calibrate,
        ),
    }
)
