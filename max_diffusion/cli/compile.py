"""``max-diffusion compile``: a model's graphs as files, for this machine or others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import DeviceError, RequestCancelled
from .command import Command, add_source_options, source_of
from .terminal import Interruption, Progress

if TYPE_CHECKING:
    from ..exporting import Exported


def _compile(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..core.files import check_folder
    from ..execution.targets import Target, host_targets, parse_target
    from ..exporting import Export, Model, export_graphs

    check_folder(args.output)
    targets = [parse_target(text) for text in args.target]
    if not targets:
        hosts = host_targets()
        if not hosts:
            raise DeviceError(
                "compile: what this processor has is in doubt; name one with --target"
            )
        targets = [Target(hosts[0])]
    model = Model(
        path=args.model,
        dtype=args.dtype,
        caches=args.caches,
        pictures=args.pictures,
        **source_of(args),
        plugins=tuple(args.plugin),
    )
    wanted = Export(
        model, list(dict.fromkeys(targets)), Path(args.output), jobs=args.jobs
    )
    files = []
    with ExitStack() as stack:
        progress = Progress(stack, is_shown=sys.stderr.isatty(), word="compiling")
        progress.on_share(0.0, "its graphs are built")
        for done, total in export_graphs(wanted, partial(_check, interruption)):
            files.append(done)
            progress.on_share(len(files) / total, f"{len(files)} of {total}")
            if not args.json:
                took = f"{done.seconds:.0f} s" if done.seconds else "was there"
                size = done.artefact.path.stat().st_size / 2**20
                print(f"{done.artefact.path}: {size:.2f} MiB, {took}")
    if args.json:
        print(json.dumps({"graphs": [_row(done) for done in files]}))


def _check(interruption: Interruption) -> None:
    try:
        interruption.check()
    except RequestCancelled as err:
        raise RequestCancelled("stopped by Ctrl-C, what was compiled stays") from err


def _row(done: Exported) -> dict[str, Any]:
    manifest = done.artefact.manifest
    return {
        "module": manifest.name,
        "target": manifest.target,
        "file": str(done.artefact.path),
        "bytes": done.artefact.path.stat().st_size,
        "seconds": done.seconds,
    }


def _add_options(add: Callable[..., Any]) -> None:
    add(
        "model",
        metavar="MODEL",
        help="demo, demo-video, a diffusers folder or a hub repo id",
    )
    add(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="folder for the graphs; what it has already stays",
    )
    add(
        "--target",
        action="append",
        default=[],
        metavar="NAME",
        # Not from HOSTS, which imports MAX; a test compares.
        help="what they shall run on: linux-x86-64-v4-bf16, linux-x86-64-v4, "
        "linux-x86-64-v3, linux-aarch64-bf16, linux-aarch64, macos-arm64, or a GPU "
        "such as cuda:sm_90, with its processor as in cuda:sm_90+linux-aarch64; may be "
        "repeated; default: this processor's",
    )
    add(
        "--caches",
        metavar="NAME[:KEY=VALUE],...",
        help="whose graphs to compile, or all; default: none and taylorseer, which "
        "auto and step-mask need too",
    )
    add(
        "--pictures",
        action="store_true",
        help="also the graphs for pictures to start from",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: by target and weights",
    )
    add_source_options(add)
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="graphs compiled at a time, 3 GiB each; default: by memory and cores",
    )
    add("--json", action="store_true", help="print the result as JSON")
    add("--debug", action="store_true", help="show tracebacks of errors")


COMPILE: Final = Command(
    "compile a model's graphs into files, also for other machines",
    _add_options,
    _compile,
)
