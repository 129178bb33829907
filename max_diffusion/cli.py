"""The command line: parse, resolve, build, run, save."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, get_type_hints

from . import __version__
from .errors import MaxDiffusionError, RequestCancelled, RequestError

_CACHE_NAMES = ("none", "taylorseer", "first-block")
_NUMBERS: Mapping[type, str] = {int: "a whole number", float: "a number"}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of ``max-diffusion``; exits with the error's code."""
    args = _parser().parse_args(arguments)
    interruption = Interruption()
    signal.signal(signal.SIGINT, interruption.on_signal)
    try:
        args.run(args, interruption)
    except MaxDiffusionError as err:
        if args.debug:
            raise
        word = "cancelled" if isinstance(err, RequestCancelled) else "error"
        print(f"{word}: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    except BrokenPipeError:
        # The reader of our output has left; nothing more to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


class Interruption:
    """Ctrl-C: the first stops at the next step, the second at once."""

    def __init__(self) -> None:
        self.is_asked = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.is_asked:
            # No clean-up: a compile in MAX does not return for a minute.
            os._exit(RequestCancelled.exit_code)
        self.is_asked = True
        print("stopping at the next step; again to stop at once", file=sys.stderr)

    def check(self) -> None:
        """Raises if the user asked to stop."""
        if self.is_asked:
            raise RequestCancelled("stopped by Ctrl-C; nothing was written")


def _generate(args: argparse.Namespace, interruption: Interruption) -> None:
    from .images import check_writable, output_paths, save_png, text_chunks

    output = Path(args.output)
    pictures = len(args.prompts) * args.num_images
    for path in output_paths(output, max(pictures, 1)):
        check_writable(path)
    timeline = Path(args.timeline) if args.timeline else None
    if timeline is not None:
        check_writable(timeline)
    cache = _cache(args.cache, args.cache_option)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    # Imported here: bad arguments should be told without loading MAX.
    from .registry import load_pipeline

    with ExitStack() as stack:
        progress = _Progress(stack, is_shown=sys.stderr.isatty())
        pipeline = load_pipeline(
            args.model,
            device=args.device,
            dtype=args.dtype,
            cache=cache,
            variant=args.variant,
            show_progress=sys.stderr.isatty(),
            on_event=progress.on_event,
        )

        def on_step(done: int, total: int) -> None:
            progress.on_step(done, total)
            interruption.check()

        interruption.check()
        result = pipeline.generate(
            args.prompts,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            true_cfg_scale=args.true_cfg,
            negative_prompt=args.negative_prompt,
            seed=seed,
            num_images_per_prompt=args.num_images,
            on_step=on_step,
        )
        interruption.check()
    report = result.report
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    paths = output_paths(output, len(result.images))
    for index, (path, picture) in enumerate(zip(paths, result.images, strict=True)):
        save_png(path, picture, text_chunks(report, index))
    if timeline is not None:
        from .images import save_atomically
        from .timeline import draw_timeline

        save_atomically(timeline, draw_timeline(report))
    if args.json:
        print(json.dumps({"files": [str(p) for p in paths], **report.to_dict()}))
        return
    for path in paths:
        print(
            f"{path}: seed {report.seed}, {report.total_seconds:.2f} s, "
            f"{report.full_passes} of {report.total_passes} full passes"
        )


def _cache(name: str, options: Sequence[str]) -> Any:
    """A cache's name and ``key=value`` options to its configuration."""
    from .caches import CACHES

    kind = CACHES[name]
    types = get_type_hints(kind)
    known = {item.name for item in fields(kind) if item.default is not MISSING}
    values: dict[str, Any] = {}
    for option in options:
        key, separator, text = option.partition("=")
        if not separator:
            raise RequestError(f"--cache-option: expected key=value, got {option!r}")
        if key not in known:
            there = ", ".join(sorted(known)) or "none"
            raise RequestError(
                f"--cache-option: {name} has no option {key!r}; it has {there}"
            )
        try:
            values[key] = types[key](text)
        except ValueError as err:
            raise RequestError(
                f"--cache-option: {key} must be {_NUMBERS[types[key]]}, got {text!r}"
            ) from err
    return kind(**values)


class _Progress:
    """Progress bars on a terminal, nothing elsewhere."""

    def __init__(self, stack: ExitStack, *, is_shown: bool) -> None:
        self._tasks: dict[str, Any] = {}
        self._bars: Any = None
        if is_shown:
            # Imported here: 0.1 s that a script's run does not need.
            from rich.console import Console
            from rich.progress import Progress

            self._bars = stack.enter_context(
                Progress(console=Console(stderr=True), transient=True)
            )

    def on_event(self, stage: str, what: str) -> None:
        if self._bars is None:
            return
        if what == "start":
            words = {"load": "loading weights", "compile": "compiling (once a model)"}
            self._tasks[stage] = self._bars.add_task(words[stage], total=None)
        else:
            self._bars.remove_task(self._tasks.pop(stage))

    def on_step(self, done: int, total: int) -> None:
        if self._bars is None:
            return
        if "step" not in self._tasks:
            self._tasks["step"] = self._bars.add_task("denoising", total=total)
        self._bars.update(self._tasks["step"], completed=done)


class _Parser(argparse.ArgumentParser):
    """Errors in this project's one-line form; exit code 2 is argparse's own."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(RequestError.exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="max-diffusion",
        description="Text-to-image diffusion as compiled graphs on Modular MAX.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="draw pictures from prompts")
    generate.set_defaults(run=_generate)
    _add_generate_options(generate.add_argument)
    return parser


def _add_generate_options(add: Callable[..., Any]) -> None:
    add("prompts", nargs="+", metavar="PROMPT", help="several are drawn as one batch")
    add("--model", default="demo", help="demo, a diffusers folder or a hub repo id")
    add("--variant", help="weight files' variant, for example fp16")
    add("--output", default="out.png", help="several pictures: out-1.png ...")
    add("--height", type=int, help="pixels; default: the model's")
    add("--width", type=int, help="pixels; default: the model's")
    add("--steps", type=int, help="denoising steps, default 50")
    add("--guidance", type=float, help="guidance scale of distilled models, 3.5")
    add("--true-cfg", type=float, default=1.0, help="classifier-free guidance, off at 1")
    add("--negative-prompt", help="needs --true-cfg above 1")
    add("--seed", type=int, help="default: random, and printed")
    add("--num-images", type=int, default=1, help="pictures of each prompt")
    add("--cache", choices=_CACHE_NAMES, default="none", help="denoising cache")
    add("--cache-option", action="append", default=[], metavar="KEY=VALUE")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:INDEX")
    add("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    add("--timeline", metavar="FILE.png", help="a picture of what each step did")
    add("--json", action="store_true", help="print the run's report as JSON")
    add("--debug", action="store_true", help="show tracebacks")


if __name__ == "__main__":
    main()
