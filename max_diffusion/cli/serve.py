"""``max-diffusion serve``: its options, checked before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .command import (
    Command,
    add_running_options,
    add_source_options,
    source_of,
)
from .options import chosen_cache, memory_size
from .terminal import Interruption

# Those that forecast the prediction: together they compile little more than none does.
_CACHES: Final = "none,taylorseer,auto,step-mask"


def _serve(args: argparse.Namespace, interruption: Interruption) -> None:
    from ..caches import caches_from_text
    from ..core.loras import files_by_name
    from ..engine import EngineConfig
    from ..errors import RequestError
    from ..pipelines.opening import DEMO_MODELS
    from ..serving.http import ServerSettings
    from ..serving.http.run import Model, serve
    from ..serving.http.settings import read_api_keys

    caches = caches_from_text(args.caches)
    keys = tuple(args.api_key)
    if args.api_key_file is not None:
        keys += read_api_keys(Path(args.api_key_file))
    is_folder = args.model not in DEMO_MODELS and Path(args.model).is_dir()
    shown = Path(args.model).resolve().name if is_folder else args.model
    settings = ServerSettings(
        model=args.served_model_name or shown,
        api_keys=keys,
        cors_origins=tuple(args.cors_origin),
        max_body_bytes=memory_size("--max-body", args.max_body) or 0,
        max_upload_bytes=memory_size("--max-upload", args.max_upload) or 0,
        max_prompt_length=args.max_prompt_length,
        max_n=args.max_n,
        max_size=args.max_size,
        max_steps=args.max_steps,
        max_frames=args.max_frames,
        timeout=args.timeout,
    )
    engine = EngineConfig(
        max_running=args.max_running,
        max_queued=args.max_queued,
        max_step_samples=args.max_step_samples,
        max_batch=args.max_batch,
        memory_limit=memory_size("--memory-limit", args.memory_limit),
    )
    if args.lora_memory is not None and not args.lora:
        raise RequestError(
            "--lora-memory: has no effect without --lora; leave it out, or name files"
        )
    model = Model(
        path=args.model,
        device=args.device,
        dtype=args.dtype,
        cache=chosen_cache(args.cache, args.cache_option, args.cache_file),
        caches=caches,
        calibration=args.calibration,
        adapters=files_by_name("--lora", args.lora),
        adapter_memory_limit=memory_size("--lora-memory", args.lora_memory),
        **source_of(args),
        precompiled=args.precompiled,
        require_precompiled=args.require_precompiled,
        threads=args.threads,
        takes_pictures=args.pictures,
        offload_text_encoders=args.offload_text_encoders,
    )
    serve(
        model,
        settings,
        engine,
        host=args.host,
        port=args.port,
        drain_seconds=args.drain_timeout,
        has_access_log=args.access_log,
    )


def _add_options(add: Callable[..., Any]) -> None:
    add(
        "--model",
        default="demo",
        help="demo, demo-video, a diffusers folder or a hub repo id",
    )
    add_source_options(add)
    add("--device", default="auto", help="auto, cpu, gpu or gpu:INDEX")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: by device and weights",
    )
    add("--cache", metavar="NAME", help="of requests that name none; default none")
    add("--cache-option", action="append", default=[], metavar="KEY=VALUE")
    add("--cache-file", metavar="FILE", help="what tune has written, instead")
    add(
        "--caches",
        default=_CACHES,
        metavar="NAME[:KEY=VALUE],...",
        help="what requests may name; options where they need graphs of their own, as "
        "in taylorseer:target=modules; all compiles for minutes more the first time; "
        "default %(default)s",
    )
    add(
        "--pictures",
        action="store_true",
        help="take pictures to start from, at /v1/images/edits; compiles the encoder "
        "of the model too",
    )
    add("--calibration", metavar="FILE", help="measurements instead of the model's")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="LoRA that requests may choose by this name; may be repeated",
    )
    add(
        "--lora-memory",
        metavar="SIZE",
        help="of matrices that these change; default a quarter of the free",
    )
    add_running_options(add)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all")
    add("--port", type=int, default=8000, help="default 8000; 0 is any that is free")
    add("--served-model-name", metavar="ID", help="id of the model for clients")
    add("--api-key", action="append", default=[], metavar="KEY", help="may be repeated")
    add("--api-key-file", metavar="FILE", help="a key a line; not seen by ps")
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose pages may ask from a browser, such as https://example.org, or * "
        "for all; may be repeated",
    )
    add("--max-body", default="256KiB", metavar="SIZE", help="of a request")
    add("--max-upload", default="32MiB", metavar="SIZE", help="of one with pictures")
    add("--max-prompt-length", type=int, default=32_000, help="characters")
    add("--max-n", type=int, default=10, help="pictures of a request")
    add("--max-size", type=int, default=2048, help="pixels a side")
    add("--max-steps", type=int, default=200, help="denoising steps")
    add("--max-frames", type=int, default=161, help="frames of a video")
    add("--timeout", type=float, default=600.0, help="seconds a request gets at most")
    add("--max-running", type=int, default=64, help="requests that hold memory")
    add("--max-queued", type=int, default=256, help="requests that wait; then 429")
    add("--max-step-samples", type=int, default=16, help="pictures of a step")
    add("--max-batch", type=int, default=8, help="pictures of a graph's run")
    add("--memory-limit", metavar="SIZE", help="of requests; default half of the free")
    add("--drain-timeout", type=float, default=30.0, help="seconds after SIGTERM")
    add("--access-log", action="store_true", help="a line for every request")
    add("--debug", action="store_true", help="show tracebacks of errors")


SERVE: Final = Command("answer requests over HTTP", _add_options, _serve)
