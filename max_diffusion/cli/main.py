"""The command line: parse, resolve, build, run, save."""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..errors import MaxDiffusionError, RequestCancelled, RequestError
from .evaluation import EVALUATION_COMMANDS
from .model import MODEL_COMMANDS
from .options import chosen_cache, memory_size, one_or_several, parse_seeds
from .serve import SERVE
from .terminal import Interruption, Progress

# What needs MAX, Pillow or rich is imported where it is used, so that --version and
# most mistakes are answered at once.
if TYPE_CHECKING:
    from ..caches import AbstractCacheConfig
    from ..core.request import GenerationRequest
    from ..pipelines.text_to_image import GenerationResult
    from .like import Likeness


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line; exits with the error's code."""
    # Closed by the caller, as with 2>&-: print would send errors to standard output.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal's encoding has no character for, such as an emoji in ASCII.
        sys.stdout.reconfigure(errors="backslashreplace")
    with Interruption() as interruption:
        args = _parser().parse_args(arguments)
        code = _run(args, interruption)
    sys.exit(code)


def _run(args: argparse.Namespace, interruption: Interruption) -> int:
    try:
        if args.plugin:
            from ..plugins import load_plugins

            load_plugins(args.plugin)
        args.run(args, interruption)
        sys.stdout.flush()
    except RequestCancelled as err:
        print(f"cancelled: {err}", file=sys.stderr)
        return err.exit_code
    except MaxDiffusionError as err:
        if args.debug:
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


@dataclass(frozen=True)
class Job:
    """Arguments of ``generate``, resolved and checked as far as no model is needed."""

    request: GenerationRequest
    cache: AbstractCacheConfig
    output: Path
    timeline: Path | None
    model: str
    dtype: str | None
    like: Likeness | None
    """A picture to repeat, but for what was given beside it."""
    is_one: bool
    """Whether only the picture that is to be repeated is wanted, of its batch."""

    @property
    def pictures(self) -> int:
        """To be written, all prompts together."""
        return 1 if self.is_one else self.request.num_images


def resolve(args: argparse.Namespace) -> Job:
    """Checks arguments before anything is loaded.

    Raises:
        RequestError: A value is malformed or out of range, or a file cannot be written.
    """
    from ..core.request import GenerationRequest
    from ..media.images import PICTURE_KINDS, check_sides, check_writable, output_paths

    like = None
    if args.like is not None:
        from .like import Likeness

        like = Likeness.of(Path(args.like))
    seeds = parse_seeds(args.seed)
    given = {
        "prompts": tuple(map(_typed, args.prompts)) or None,
        "prompt_2": one_or_several(list(map(_typed, args.prompt_2))),
        "negative_prompt": one_or_several(list(map(_typed, args.negative_prompt))),
        "negative_prompt_2": one_or_several(list(map(_typed, args.negative_prompt_2))),
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "true_cfg_scale": args.true_cfg,
        "seed": seeds[0] if seeds else None,
        "seeds": seeds if seeds and len(seeds) > 1 else None,
        "num_images_per_prompt": args.num_images,
        "max_sequence_length": args.max_sequence_length,
        "cache_memory_limit": memory_size(
            "--cache-memory-limit", args.cache_memory_limit
        ),
    }
    if given["seed"] == -1 and given["seeds"] is None:
        given["seed"] = secrets.randbelow(2**32)  # as on the server
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked.get("prompts") and like is None:
        raise RequestError(
            "the following arguments are required: PROMPT, or --like FILE"
        )
    is_one = like is not None and not asked.keys() & {
        "prompts",
        "num_images_per_prompt",
    }
    cache = _cache(args, like)
    if like is not None:
        before = dict(like.asked)
        if "num_inference_steps" in asked:
            before.pop("sigmas", None)
        if "seed" in asked:
            of_each = list(before.pop("seeds", ()))
            if of_each and is_one and "seeds" not in asked:
                # The picture has noise of its own, as it would alone.
                of_each[like.picture] = asked["seed"]
                asked["seeds"] = tuple(of_each)
        asked = before | asked
    asked.setdefault("seed", secrets.randbelow(2**32))
    # Both show how long each step took; without them a GPU is not waited for.
    is_timed = args.json or args.timeline is not None
    request = GenerationRequest(**asked | {"cache": None, "is_timed": is_timed})
    timeline = Path(args.timeline) if args.timeline is not None else None
    model, dtype = args.model, args.dtype
    if like is not None:
        model, dtype = model or like.text("model"), dtype or like.text("dtype")
    output = Path(args.output)
    job = Job(request, cache, output, timeline, model or "demo", dtype, like, is_one)
    files = output_paths(job.output, job.pictures)
    if timeline and timeline.resolve() in {file.resolve() for file in files}:
        raise RequestError(f"--timeline: {timeline} is a picture's name already")
    for path in files:
        check_writable(path, "--output", *PICTURE_KINDS)
        check_sides(path, request.height, request.width, "--output")
    if timeline:
        check_writable(timeline, "--timeline")
    return job


def _typed(text: str) -> str:
    """UTF-8 of the command line, also where the locale is not."""
    if not any("\udc80" <= mark <= "\udcff" for mark in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        return text  # which the request will refuse


def _cache(args: argparse.Namespace, like: Likeness | None) -> AbstractCacheConfig:
    """The cache asked for; options alone change that of the picture to repeat."""
    if like is None or args.cache is not None or args.cache_file is not None:
        return chosen_cache(args.cache, args.cache_option, args.cache_file)
    return like.cache(args.cache_option)


def _generate(args: argparse.Namespace, interruption: Interruption) -> None:
    job = resolve(args)
    from ..pipelines.registry import open_model

    request, is_shown = job.request, sys.stderr.isatty()
    with ExitStack() as stack:
        progress = Progress(stack, is_shown=is_shown)
        pipeline = open_model(
            job.model,
            device=args.device,
            dtype=job.dtype,
            cache=job.cache,
            calibration=args.calibration,
            variant=args.variant,
            revision=args.revision,
            show_progress=is_shown,
            on_event=progress.on_event,
        )
        # Compiling takes minutes: a size that the model cannot draw is told before.
        pipeline.create_context(request)
        pipeline.compile()

        def on_step(done: int, total: int) -> None:
            progress.on_step(done, total)
            interruption.check()

        interruption.check()
        result = pipeline.draw(request, on_step=on_step)
        interruption.check()
    _save(job, result, is_json=args.json)


def _save(job: Job, result: GenerationResult, *, is_json: bool) -> None:
    from ..media.images import output_paths, save_atomically, save_picture
    from ..media.metadata import exif_and_xmp, text_chunks

    report = result.report
    warnings = [*report.warnings, *(job.like.differences(report) if job.like else ())]
    wanted = list(enumerate(result.images))
    if job.like is not None and job.is_one:
        wanted = wanted[job.like.picture :][:1]
    paths = output_paths(job.output, len(wanted))
    for path, (index, picture) in zip(paths, wanted, strict=True):
        text = text_chunks(report, index)
        save_picture(path, picture, text)
        is_jpeg = path.suffix.lower() in (".jpg", ".jpeg")
        if is_jpeg and len(exif_and_xmp("jpeg", text)) < 2:
            warnings.append(
                f"{path}: a JPEG has no room for all of its settings; write a .png or "
                ".webp to keep them"
            )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if job.timeline is not None:
        from ..media.timeline import draw_timeline

        save_atomically(job.timeline, draw_timeline(report))
    if is_json:
        print(json.dumps({"files": [str(p) for p in paths], **report.to_dict()}))
        return
    # Of the batch: its pictures are drawn together.
    took = f"{report.total_seconds:.2f} s"
    passes = f"{report.full_passes} of {report.total_passes} full passes"
    for path, (index, _) in zip(paths, wanted, strict=True):
        print(f"{path}: seed {report.seed_of(index)}, {took}, {passes}")


class _Parser(argparse.ArgumentParser):
    """Errors in this project's one-line form; exit code 2 is argparse's own."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(RequestError.exit_code)


class _CommandParser(_Parser):
    """Where caches take options, lists them as their classes have them."""

    def format_help(self) -> str:
        if not self.prog.endswith(("generate", "compare")):
            return super().format_help()
        from ..caches import CACHES

        lines = ["", "cache options and their defaults:"]
        for name, kind in CACHES.items():
            options = (
                item.name + ("" if item.default is MISSING else f"={item.default}")
                for item in fields(kind)
            )
            lines.append(f"  {name:12} {' '.join(options) or '(none)'}")
        return super().format_help() + "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="max-diffusion",
        description="Text-to-image diffusion as compiled graphs on Modular MAX.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=_CommandParser
    )
    generate = commands.add_parser(
        "generate", help="draw pictures from prompts", allow_abbrev=False
    )
    generate.set_defaults(run=_generate)
    _add_generate_options(generate.add_argument)
    _add_plugin_option(generate.add_argument)
    for name, command in {
        **MODEL_COMMANDS,
        **EVALUATION_COMMANDS,
        "serve": SERVE,
    }.items():
        parts = commands.add_parser(name, help=command.help, allow_abbrev=False)
        parts.set_defaults(run=command.run)
        command.add_options(parts.add_argument)
        _add_plugin_option(parts.add_argument)
    return parser


def _add_plugin_option(add: Callable[..., Any]) -> None:
    add(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="load caches and model families of others: a module's name or a .py file; "
        "may be repeated",
    )


def _add_generate_options(add: Callable[..., Any]) -> None:
    add("prompts", nargs="*", metavar="PROMPT", help="several are drawn as one batch")
    add(
        "--like",
        metavar="FILE",
        help="repeat a picture of this command or server, but for other options given",
    )
    add("--model", help="demo, the default, a diffusers folder or a hub repo id")
    add("--variant", help="weight files' variant, for example fp16")
    add("--revision", help="branch, tag or commit of a model of the hub")
    add(
        "--output",
        default="out.png",
        help=".png, .jpg, .jpeg or .webp; several pictures: out-1.png ...",
    )
    add("--height", type=int, help="pixels; default: the model's")
    add("--width", type=int, help="pixels; default: the model's")
    add("--steps", type=int, help="denoising steps; default: the model's, 28 or 4")
    add("--guidance", type=float, help="guidance scale of distilled models, 3.5")
    add("--true-cfg", type=float, help="classifier-free guidance; default 1, off")
    several = {"action": "append", "default": [], "metavar": "TEXT"}
    add(
        "--negative-prompt",
        help="needs --true-cfg above 1; once, or once for each prompt",
        **several,
    )
    add("--prompt-2", help="what T5 reads instead; likewise", **several)
    add("--negative-prompt-2", help="likewise", **several)
    add(
        "--max-sequence-length",
        type=int,
        metavar="TOKENS",
        help="of T5; default: the model's most. FLUX.1-schnell: usually 256",
    )
    add(
        "--seed",
        metavar="SEED[,SEED...]",
        help="one, or one of each picture, which is then the same when drawn alone; "
        "default, and -1: random, printed and stored in the picture",
    )
    add("--num-images", type=int, help="pictures of each prompt, default 1")
    add(
        "--cache",
        metavar="NAME",
        help="denoising cache, see below; default none",
    )
    add(
        "--cache-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the cache, see below; may be repeated",
    )
    add("--cache-file", metavar="FILE", help="what tune has written, instead")
    add(
        "--cache-memory-limit",
        metavar="SIZE",
        help="refuse a cache whose state may take more, such as 64MiB",
    )
    add("--calibration", metavar="FILE", help="measurements instead of the model's")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:INDEX")
    add("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    add(
        "--timeline",
        metavar="FILE.png",
        help="a picture of what each step did; it and --json time each step, for which "
        "a GPU is waited for",
    )
    add("--json", action="store_true", help="print the run's report as JSON")
    add("--debug", action="store_true", help="show tracebacks of errors")


if __name__ == "__main__":
    main()
