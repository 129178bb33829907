"""The command line of the benchmarks; ``scripts/bench`` runs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from max_diffusion.cli.terminal import Interruption, Progress
from max_diffusion.errors import RequestError

from .command import Parser, errors_told
from .plan import GROUPS
from .report import RESULTS, check_targets, save_bench, update_readme
from .run import bench

_FILE_WIDTH = 160  # columns where there is no terminal to ask


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Measures and writes; exits with 0, or the error's code."""
    with Interruption() as interruption:
        args = _parser().parse_args(arguments)
        with errors_told(is_debugging=args.debug):
            _measure(args, interruption)
    sys.exit(0)


def _measure(args: argparse.Namespace, interruption: Interruption) -> None:
    if args.readme is not None and args.quick:
        raise RequestError(
            "--readme: the README takes the full form; leave out --quick"
        )
    folder = Path(args.output or ("benchmarks-quick" if args.quick else "benchmarks"))
    readme = None if args.readme is None else Path(args.readme)
    check_targets(folder, readme)
    with ExitStack() as stack:
        progress = Progress(stack, is_shown=sys.stderr.isatty(), word="measuring")

        def tell(share: float, what: str) -> None:
            progress.on_share(share, what)
            interruption.check()

        groups = GROUPS
        if args.only is not None:
            groups = tuple(name.strip() for name in args.only.split(","))
        result = bench(
            is_quick=args.quick,
            groups=groups,
            rounds=args.rounds,
            work=None if args.work is None else Path(args.work),
            on_progress=tell,
        )
    files = save_bench(result, folder)
    if readme is not None:
        update_readme(readme, folder / RESULTS)
    if args.json:
        print(json.dumps({"files": [*map(str, files)], **result.to_dict()}))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(Markdown(files[0].read_text(encoding="utf-8")))
    print(files[0])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="scripts/bench",
        description="Measures max_diffusion against diffusers, torch.compile, OpenVINO "
        "and MAX's own cache.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="under 3 minutes: the demo model, float32, TaylorSeer, one round",
    )
    add(
        "--only",
        metavar="GROUPS",
        help=f"of {', '.join(GROUPS)}; the folder's figures of others stay",
    )
    add("--rounds", type=int, default=3, help="processes of each runtime")
    add("-o", "--output", metavar="FOLDER", help="benchmarks, or benchmarks-quick")
    add(
        "--work", metavar="FOLDER", help="for peers' environments; default ~/.cache/..."
    )
    add(
        "--readme", metavar="FILE", help="whose table between its marks is written anew"
    )
    add("--json", action="store_true", help="print the result as JSON")
    add("--debug", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    main()
