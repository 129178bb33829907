"""The command line of the check; ``scripts/gpu_check`` runs it."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from benchmarks.harness.command import Parser, errors_told
from benchmarks.harness.run import default_work_folder
from max_diffusion.cli.terminal import Interruption, Progress

from .check import gpu_check
from .page import check_target, save_gpu_check
from .plan import PARTS, ROUNDS, GpuPlan, GpuResult
from .sizes import SIZES


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Checks and writes; exits with 0, 1 after failures, or the error's code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    with Interruption() as interruption:
        args = _parser().parse_args(given)
        with errors_told(is_debugging=args.debug):
            result = _check(args, given, interruption)
    sys.exit(1 if result.failures else 0)


def _check(
    args: argparse.Namespace, given: Sequence[str], interruption: Interruption
) -> GpuResult:
    parts: Sequence[str] = PARTS
    if args.only is not None:
        parts = tuple(name.strip() for name in args.only.split(","))
    plan = GpuPlan(
        size=SIZES[args.size],
        device=args.device,
        parts=parts,
        rounds=args.rounds,
        minutes=args.minutes,
        is_eager=args.eager,
        precompiled=tuple(Path(folder).absolute() for folder in args.precompiled),
        command=shlex.join(["scripts/gpu_check", *given]),
        tests=tuple(Path(path).absolute() for path in args.tests) or GpuPlan.tests,
    )
    plan.check()
    is_full = args.size == "full"
    folder = Path(args.output or ("benchmarks" if is_full else "benchmarks-gpu-tiny"))
    check_target(folder)
    work = default_work_folder() if args.work is None else Path(args.work)
    with ExitStack() as stack:
        progress = Progress(stack, is_shown=sys.stderr.isatty(), word="checking")

        def tell(share: float, what: str) -> None:
            progress.on_share(share, what)
            interruption.check()

        result = gpu_check(plan, work.absolute(), tell)
    files = save_gpu_check(result, folder)
    if args.json:
        print(json.dumps({"files": [*map(str, files)], **result.to_dict()}))
        return result
    for words in result.failures:
        print(f"not as it should be: {words}", file=sys.stderr)
    print(files[0])
    return result


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="scripts/gpu_check",
        description="On a machine with a GPU: runs the tests that need one, compares a "
        "step with float32's, measures FLUX.1's full shapes with random weights "
        "against torch.compile, and writes gpu.json and gpu.md.",
        epilog="Exit codes: 0 all is well, 1 tests failed or figures are not as they "
        "should be (all is written nevertheless), 2 a bad value, 5 MAX sees no GPU.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--only", metavar="PARTS", help=f"of {','.join(PARTS)}; default all of them")
    add(
        "--size",
        choices=tuple(SIZES),
        default="full",
        help="full: FLUX.1-dev's shapes, 36 GiB on disk; tiny: the demo model's",
    )
    add("--device", default="gpu", help="gpu, gpu:INDEX, or cpu to try the tiny size")
    add("--rounds", type=int, default=ROUNDS, help="processes of each runtime")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="after which no other process begins, and what there is is written",
    )
    add(
        "--eager",
        action="store_true",
        help="diffusers without torch.compile, which takes minutes itself",
    )
    add(
        "--precompiled",
        metavar="FOLDER",
        action="append",
        default=[],
        help="graphs of max-diffusion compile; may be repeated",
    )
    add(
        "--tests",
        metavar="PATH",
        action="append",
        default=[],
        help="tests to run, of those marked gpu; default tests/gpu",
    )
    add("-o", "--output", metavar="FOLDER", help="benchmarks, or benchmarks-gpu-tiny")
    add("--work", metavar="FOLDER", help="for random models; default ~/.cache/...")
    add("--json", action="store_true", help="print the result as JSON")
    add("--debug", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    main()
