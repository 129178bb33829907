"""``max-diffusion generate``: resolve, open, compile, draw, save."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..core.setting_names import flags
from ..errors import RequestError
from .command import (
    Command,
    add_lora_option,
    add_picture_options,
    add_running_options,
    add_source_options,
    merged_loras,
    model_options,
    source_of,
    starting_pictures,
)
from .options import chosen_cache, memory_size, one_or_several, parse_seeds, typed
from .terminal import Interruption, Progress

# What needs MAX, Pillow or rich is imported where it is used, so that most mistakes are
# answered at once.
if TYPE_CHECKING:
    from ..caches import AbstractCacheConfig
    from ..core.loras import Loras
    from ..core.request import GenerationRequest
    from ..pipelines.outputs import GenerationResult
    from .like import Likeness


@dataclass(frozen=True)
class Job:
    """Arguments of ``generate``, resolved and checked as far as no model is needed."""

    request: GenerationRequest
    cache: AbstractCacheConfig
    output: Path
    timeline: Path | None
    model: str
    transformer: str | None
    dtype: str | None
    loras: Loras
    """Files that are merged into the model, each with its weight."""
    like: Likeness | None
    """Settings of the image to repeat, but for what was given beside it; ``None`` if
    there is none."""
    is_one: bool
    """Whether only the image to repeat is wanted, not all of its batch."""

    @property
    def num_images(self) -> int:
        """Number of images to write, of all prompts together."""
        return 1 if self.is_one else self.request.num_images


def resolve(args: argparse.Namespace) -> Job:
    """Resolves and checks the arguments before anything is loaded.

    Raises:
        RequestError: A value is malformed or out of range, or a file cannot be written.
    """
    from ..core.request import GenerationRequest
    from ..media.images import check_writable, output_paths
    from ..media.writers import FORMATS, check_sides

    like = None
    if args.like is not None:
        from .like import Likeness

        like = Likeness.of(Path(args.like))
    # -1 is a random one, as on the server.
    seeds = tuple(
        secrets.randbelow(2**32) if seed == -1 else seed
        for seed in parse_seeds(args.seed)
    )
    given = {
        "prompts": tuple(map(typed, args.prompts)) or None,
        "prompt_2": one_or_several(list(map(typed, args.prompt_2))),
        "negative_prompt": one_or_several(list(map(typed, args.negative_prompt))),
        "negative_prompt_2": one_or_several(list(map(typed, args.negative_prompt_2))),
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "true_cfg_scale": args.true_cfg_scale,
        "seed": seeds[0] if seeds else None,
        "seeds": seeds if seeds and len(seeds) > 1 else None,
        "num_images_per_prompt": args.num_images_per_prompt,
        "options": model_options(args) or None,
        "inputs": starting_pictures(args),
        "cache_memory_limit": memory_size(
            "--cache-memory-limit", args.cache_memory_limit
        ),
    }
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
        asked["inputs"] = like.inputs(given["inputs"])
        before = dict(like.asked)
        if "num_inference_steps" in asked:
            before.pop("sigmas", None)
        if "seed" in asked:
            of_each = list(before.pop("seeds", ()))
            if of_each and is_one and "seeds" not in asked:
                # The image has noise of its own, as it would alone.
                of_each[like.image] = asked["seed"]
                asked["seeds"] = tuple(of_each)
        if "options" in asked:
            asked["options"] = {**before.get("options", {}), **asked["options"]}
        asked = before | asked
    asked.setdefault("seed", secrets.randbelow(2**32))
    loras = merged_loras(args)
    # Those of an image are merged, too, whoever drew it.
    known = asked.pop("loras", ())
    if like is not None and known and not loras:
        loras = like.lora_files()
    # Both show how long each step took; without them a GPU is not waited for.
    is_timed = args.json or args.timeline is not None
    request = GenerationRequest(**asked | {"cache": None, "is_timed": is_timed})
    timeline = Path(args.timeline) if args.timeline is not None else None
    model, transformer, dtype = args.model, args.transformer, args.dtype
    if like is not None:
        if model is None:  # another model's transformer would not fit it
            transformer = transformer or like.text("transformer")
        model, dtype = model or like.text("model"), dtype or like.text("dtype")
    if model == "":
        raise RequestError("--model: expected a name or a folder, got nothing")
    output = Path(args.output)
    if not output.suffix:
        check_writable(output, "--output", *FORMATS)  # before it is numbered
    if timeline:
        check_writable(timeline, "--timeline")
    job = Job(
        *(request, cache, output, timeline, model or "demo", transformer, dtype),
        *(loras, like, is_one),
    )
    files = output_paths(job.output, job.num_images)
    if timeline and timeline.resolve() in {file.resolve() for file in files}:
        raise RequestError(f"--timeline: {timeline} is a picture's name already")
    for path in files:
        check_writable(path, "--output", *FORMATS)
        check_sides(path, request.height, request.width, "--output")
    return job


def _cache(args: argparse.Namespace, like: Likeness | None) -> AbstractCacheConfig:
    """Returns the cache asked for; options alone change that of the image to repeat."""
    if like is None or args.cache is not None or args.cache_file is not None:
        return chosen_cache(args.cache, args.cache_option, args.cache_file)
    return like.cache(args.cache_option)


def _generate(args: argparse.Namespace, interruption: Interruption) -> None:
    job = resolve(args)
    from ..core.options import declared_options
    from ..media.writers import check_frames
    from ..pipelines.opening import open_model

    request, is_shown = job.request, sys.stderr.isatty()
    unread_options: set[str] = set()
    with ExitStack() as stack:
        progress = Progress(stack, is_shown=is_shown)
        pipeline = open_model(
            job.model,
            device=args.device,
            dtype=job.dtype,
            cache=job.cache,
            loras=job.loras,
            calibration=args.calibration,
            **{**source_of(args), "transformer": job.transformer},
            precompiled=args.precompiled,
            require_precompiled=args.require_precompiled,
            threads=args.threads,
            offload_text_encoders=args.offload_text_encoders,
            show_progress=is_shown,
            on_event=progress.on_event,
        )
        if job.like is not None:
            # Another family than the file's may not have all of its options.
            given = model_options(args)
            known = declared_options(pipeline.options_class).keys() | given.keys()
            unread_options = request.options.keys() - known
            options = {k: v for k, v in request.options.items() if k in known}
            request = replace(request, options=options)
            if not pipeline.has_second_text:
                second = ("prompt_2", "negative_prompt_2")
                unread: dict[str, Any] = {
                    name: None for name in second if not vars(args)[name]
                }
                request = replace(request, **unread)
        # Compiling takes minutes: a size that the model cannot draw is told before.
        context = pipeline.create_context(request)
        check_frames(job.output, context.num_frames, "--output", context.fps)
        pipeline.compile()

        def on_step(done: int, total: int) -> None:
            progress.on_step(done, total)
            interruption.check()

        interruption.check()
        result = pipeline.draw(request, on_step=on_step)
        interruption.check()
    _save(job, result, unread_options, is_json=args.json)


def _save(
    job: Job, result: GenerationResult, unread_options: Set[str], *, is_json: bool
) -> None:
    from ..media.images import output_paths, save_atomically
    from ..media.metadata import exif_and_xmp, text_chunks
    from ..media.writers import format_of, save_frames

    report = result.report
    warnings = list(report.warnings)
    if job.like is not None:
        warnings += job.like.differences(report, unread_options)
    wanted = list(enumerate(result.frames))
    if job.like is not None and job.is_one:
        wanted = wanted[job.like.image :][:1]
    paths = output_paths(job.output, len(wanted))
    for path, (index, frames) in zip(paths, wanted, strict=True):
        text = text_chunks(report, index)
        save_frames(path, frames, text, result.fps)
        is_jpeg = format_of(path).kind == "jpeg"
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
    # Of the batch: its images are drawn together.
    took = f"{report.total_seconds:.2f} s"
    passes = f"{report.full_passes} of {report.total_passes} full passes"
    for path, (index, _) in zip(paths, wanted, strict=True):
        print(f"{path}: seed {report.seed_of(index)}, {took}, {passes}")


def _add_generate_options(add: Callable[..., Any]) -> None:
    add("prompts", nargs="*", metavar="PROMPT", help="several are drawn as one batch")
    add(
        "--like",
        metavar="FILE",
        help="repeat a picture of this command or server, but for other options given",
    )
    add("--model", help="demo, the default, a diffusers folder or a hub repo id")
    add_source_options(add)
    add_lora_option(add)
    add(
        "--output",
        default="out.png",
        help=".png, .jpg, .jpeg, .webp or .gif, of videos .mp4, .webp or .gif; of "
        "several: out-1.png ...; default out.png, and what is there is replaced",
    )
    add("--height", type=int, help="pixels; default: the model's")
    add("--width", type=int, help="pixels; default: the model's")
    add(
        *flags("num_inference_steps"),
        dest="num_inference_steps",
        type=int,
        metavar="N",
        help="denoising steps; default: the model's",
    )
    add(
        *flags("guidance_scale"),
        dest="guidance_scale",
        type=float,
        metavar="SCALE",
        help="guidance scale of distilled models; default: the model's",
    )
    add(
        *flags("true_cfg_scale"),
        dest="true_cfg_scale",
        type=float,
        metavar="SCALE",
        help="classifier-free guidance by a second pass; 1: off; default: the model's",
    )
    several = {"action": "append", "default": [], "metavar": "TEXT"}
    add(
        "--negative-prompt",
        help="needs true guidance above 1, by --true-cfg where the model's default is "
        "1; once, or once for each prompt",
        **several,
    )
    add("--prompt-2", help="what FLUX.1's T5 reads instead; likewise", **several)
    add("--negative-prompt-2", help="likewise", **several)
    add(
        "--seed",
        metavar="SEED[,SEED...]",
        help="one, or one of each picture, which is then the same when drawn alone; "
        "default, and -1: random, printed and stored in the picture",
    )
    add(
        *flags("num_images_per_prompt"),
        dest="num_images_per_prompt",
        type=int,
        metavar="N",
        help="pictures of each prompt, default 1",
    )
    add_picture_options(add)
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
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: by device and weights",
    )
    add(
        "--timeline",
        metavar="FILE.png",
        help="a picture of what each step did; it and --json time each step, for which "
        "a GPU is waited for",
    )
    add_running_options(add)
    add("--json", action="store_true", help="print the run's report as JSON")
    add("--debug", action="store_true", help="show tracebacks of errors")


GENERATE: Final = Command(
    "draw pictures from prompts",
    _add_generate_options,
    _generate,
    takes_cache_options=True,
    takes_model_options=True,
)
