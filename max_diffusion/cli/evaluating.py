"""What the commands ``compare`` and ``tune`` have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.files import read_lines
from ..core.setting_names import flags
from ..errors import RequestError
from .command import (
    add_loading_options,
    add_lora_option,
    add_picture_options,
    add_running_options,
    merged_loras,
    model_options,
    source_of,
    starting_pictures,
)
from .terminal import Interruption, Progress

if TYPE_CHECKING:
    from ..caches import AbstractCacheConfig
    from ..core.request import GenerationRequest
    from ..evaluation import Judge
    from ..evaluation.drawing import OnProgress
    from ..pipelines.text_to_image import TextToImagePipeline


def read_prompts(
    given: Sequence[str], file: str | None, option: str = "--prompts-file"
) -> tuple[str, ...] | None:
    """Returns the command line's prompts, or a file's, which has one per line."""
    if file is None:
        return tuple(given) or None
    if given:
        raise RequestError(f"{option}: give prompts there or as words, not both")
    try:
        lines = read_lines(Path(file))
    except OSError as err:
        raise RequestError(
            f"{option}: {file} cannot be read ({err.strerror}); check the path"
        ) from err
    except UnicodeDecodeError as err:
        raise RequestError(
            f"{option}: {file} is no UTF-8 text; write one prompt a line"
        ) from err
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise RequestError(f"{option}: {file} holds no prompt; write one a line")
    return prompts


def drawn_alike(args: argparse.Namespace) -> dict[str, Any]:
    """Returns how every picture is drawn, by the names of Python's keywords.

    Raises:
        RequestError: A picture to start from cannot be read.
    """
    from ..evaluation.drawing import as_keywords

    return {
        "num_inference_steps": args.num_inference_steps,
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "height": args.height,
        "width": args.width,
        "options": model_options(args),
        **as_keywords(starting_pictures(args)),
    }


def check_requests(
    pipeline: TextToImagePipeline, requests: Sequence[GenerationRequest]
) -> None:
    """Checks that an opened model can draw some requests.

    Raises:
        RequestError: The model refuses one.
    """
    for request in requests:
        pipeline.create_context(request)


@contextmanager
def loaded_model(
    args: argparse.Namespace,
    caches: Sequence[str | AbstractCacheConfig] | None,
    word: str,
    interruption: Interruption,
    check: Callable[[TextToImagePipeline], None],
) -> Iterator[tuple[TextToImagePipeline, OnProgress]]:
    """Yields the model, compiled for the caches, and what shows progress.

    By default that is what all caches need.

    ``check`` sees the opened model before its compile, which takes minutes. Progress is
    shown, and heeds Ctrl-C, until the end of the block.
    """
    from ..caches import CACHES
    from ..pipelines.opening import open_model

    with ExitStack() as stack:
        progress = Progress(stack, is_shown=sys.stderr.isatty(), word=word)
        pipeline = open_model(
            args.model,
            device=args.device,
            dtype=args.dtype,
            caches=tuple(CACHES) if caches is None else ("none", *caches),
            calibration=args.calibration,
            loras=merged_loras(args),
            **source_of(args),
            precompiled=args.precompiled,
            require_precompiled=args.require_precompiled,
            threads=args.threads,
            offload_text_encoders=args.offload_text_encoders,
            show_progress=sys.stderr.isatty(),
            on_event=progress.on_event,
        )
        check(pipeline)
        for config in pipeline.caches.loaded:
            files = pipeline.pipeline_config.loras_with(())
            for note in pipeline.caches.notes(config, files):
                print(f"warning: {note}", file=sys.stderr)
        pipeline.compile()
        if args.image:
            pipeline.graphs.require_pictures()
        interruption.check()
        yield pipeline, _teller(progress, interruption)


def _teller(progress: Progress, interruption: Interruption) -> OnProgress:
    """Returns what shows progress, and stops where the user asks for it."""

    def tell(share: float, what: str) -> None:
        progress.on_share(share, what)
        interruption.check()

    return tell


def judge_of(pipeline: TextToImagePipeline) -> Judge | None:
    """Returns the judge of whether the model's images show their prompts, if any."""
    from ..demo import judge
    from ..pipelines.opening import demo_model_name

    return judge if demo_model_name(pipeline.pipeline_config.path) else None


def add_evaluation_options(add: Callable[..., Any]) -> None:
    """Adds the options that both commands have.

    Args:
        add: The ``add_argument`` of a parser.
    """
    add(
        "--model",
        default="demo",
        help="demo, demo-video, a diffusers folder or a hub repo id",
    )
    add("--prompts-file", metavar="FILE", help="prompts, one a line")
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
        "--seed", type=int, default=0, help="of the first prompt; the next has the next"
    )
    add_picture_options(add)
    add_lora_option(add)
    add("--calibration", metavar="FILE", help="measurements instead of the model's")
    add_loading_options(add)
    add_running_options(add)
