"""The command line: parse, run, and say what went wrong."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Final, NoReturn

from .. import __version__
from ..errors import MaxDiffusionError, RequestCancelled, RequestError
from .calibrate import CALIBRATE
from .command import Command, add_model_options
from .compare import COMPARE
from .compile import COMPILE
from .generate import GENERATE
from .inspect import INSPECT
from .serve import SERVE
from .terminal import Interruption
from .tune import TUNE

COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        "generate": GENERATE,
        "inspect": INSPECT,
        "calibrate": CALIBRATE,
        "compare": COMPARE,
        "tune": TUNE,
        "serve": SERVE,
        "compile": COMPILE,
    }
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line; exits with the error's code."""
    # Closed by the caller, as with 2>&-: print would send errors to standard output.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal's encoding has no character for, such as an emoji in ASCII.
        sys.stdout.reconfigure(errors="backslashreplace")
    with Interruption() as interruption:
        code = _run(arguments, interruption)
    sys.exit(code)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line, and loads the plugins that it names.

    Options that only some models have are looked for when there is one that no command
    knows: to know them, every model family is imported, which takes a second.

    Raises:
        RequestError: A plugin cannot be loaded.
        SystemExit: As argparse does.
    """
    # First, since --help tells of their caches and options too.
    early = _Parser(prog="max-diffusion", add_help=False, allow_abbrev=False)
    early.add_argument("--plugin", action="append", default=[])
    plugins = early.parse_known_args(arguments)[0].plugin
    if plugins:
        from ..plugins import load_plugins

        load_plugins(plugins)
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:
        args, unknown = _parser(has_model_options=True).parse_known_args(arguments)
    if unknown:
        hint = ""
        command = COMMANDS[args.command]
        if command.takes_model_options and hasattr(args, "prompts"):
            hint = "give all prompts in a row, and --plugin for other models' options; "
        elif command.takes_model_options:
            hint = "give --plugin for other models' options; "
        raise RequestError(
            f"unrecognized arguments: {' '.join(unknown)}; {hint}see max-diffusion "
            f"{args.command} --help"
        )
    return args


def _run(arguments: Sequence[str] | None, interruption: Interruption) -> int:
    is_debugged = False
    try:
        args = parse(arguments)
        is_debugged = args.debug
        args.run(args, interruption)
        sys.stdout.flush()
    except RequestCancelled as err:
        print(f"cancelled: {err}", file=sys.stderr)
        return err.exit_code
    except MaxDiffusionError as err:
        if is_debugged:
            raise
        print("error:", " ".join(str(err).splitlines()), file=sys.stderr)
        return err.exit_code
    except BrokenPipeError:
        # The reader of our output has left; give Python's last flush a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as err:
        print(f"error: standard output: {err.strerror}; free some", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RequestError.exit_code
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports errors in this project's one-line form; exit code 2 is argparse's own."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(RequestError.exit_code)


class _CommandParser(_Parser):
    """Parses one command, and lists options of caches and models in its help."""

    command: Command

    def format_help(self) -> str:
        """Returns the help, with the options that families and caches declare."""
        if self.command.takes_model_options:
            add_model_options(self)
        return super().format_help() + (
            _cache_options() if self.command.takes_cache_options else ""
        )


def _cache_options() -> str:
    from ..caches import CACHES

    lines = ["", "cache options and their defaults:"]
    for name, kind in CACHES.items():
        options = (
            item.name + ("" if item.default is MISSING else f"={item.default}")
            for item in fields(kind)
        )
        lines.append(f"  {name:12} {' '.join(options) or '(none)'}")
    return "\n".join(lines) + "\n"


def _parser(*, has_model_options: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="max-diffusion",
        description="Text-to-image diffusion as compiled graphs on Modular MAX.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=_CommandParser
    )
    for name, command in COMMANDS.items():
        parts = commands.add_parser(name, help=command.help, allow_abbrev=False)
        parts.command = command
        parts.set_defaults(run=command.run, command=name)
        command.add_options(parts.add_argument)
        parts.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="MODULE",
            help="load caches and model families of others: a module's name or a .py "
            "file; may be repeated",
        )
        if has_model_options and command.takes_model_options:
            add_model_options(parts)
    return parser


if __name__ == "__main__":
    main()
