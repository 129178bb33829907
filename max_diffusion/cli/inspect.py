"""``max-diffusion inspect``: what a model is, and what each cache would do on it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from .command import Command, add_loading_options, model_options, source_of
from .terminal import Interruption

if TYPE_CHECKING:
    from ..pipelines.inspection import ModelReport

# Columns where there is no terminal to ask.
_FILE_WIDTH: Final = 140


def _inspect(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..pipelines.inspection import inspect

    report = inspect(
        args.model,
        height=args.height,
        width=args.width,
        batch=args.batch,
        true_guidance=args.true_guidance,
        options=model_options(args),
        device=args.device,
        dtype=args.dtype,
        calibration=args.calibration,
        **source_of(args),
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
        f"state of {report.batch} "
        + (
            f"videos of {report.num_frames} frames"
            if report.num_frames > 1
            else "pictures"
        )
        + f" of {report.image_tokens} image"
        + (f", {report.reference_tokens} reference" if report.reference_tokens else "")
        + f" and {report.text_tokens} text tokens"
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
    console.print(
        f"weights take {_size(report.memory.weight_bytes)} of memory, "
        f"{_size(report.memory.free_bytes)} are free: "
        + (
            f"they fit as {' and as '.join(report.memory.fits)}"
            if report.memory.fits
            else "they fit in no dtype"
        )
    )
    if report.takes:
        needed = " and ".join(report.needs)
        console.print(
            f"takes {', '.join(report.takes)}"
            + (f"; each request must bring {needed}" if needed else "")
        )
    console.print(caches)


def _size(count: float) -> str:
    """Formats bytes in the largest unit that leaves a number of 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _add_inspect_options(add: Callable[..., Any]) -> None:
    words = "demo, demo-video, a diffusers folder or a hub repo id"
    add("model", nargs="?", default="demo", metavar="MODEL", help=words)
    add("--batch", type=int, default=1, help="pictures at once")
    add(
        "--true-guidance",
        action=argparse.BooleanOptionalAction,
        help="with a second pass a step; default: the model's",
    )
    add("--calibration", metavar="FILE", help="measurements instead of the model's")
    add_loading_options(add)


INSPECT: Final = Command(
    "tell a model's weights, and what each cache would do and take",
    _add_inspect_options,
    _inspect,
    takes_model_options=True,
)
