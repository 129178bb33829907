"""The description of a command of the command line, and options that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from .options import typed
from .terminal import Interruption

# What needs MAX or Pillow is imported where it is used, so that most mistakes are
# answered at once.
if TYPE_CHECKING:
    from ..core.loras import Loras
    from ..core.pictures import PictureInputs

_MODEL_OPTION: Final = "model_option."
_SOURCE: Final = ("transformer", "variant", "revision")


@dataclass(frozen=True)
class Command:
    """One command: its help line, its options, and what it does."""

    help: str
    add_options: Callable[[Callable[..., Any]], None]
    run: Callable[[argparse.Namespace, Interruption], None]
    takes_cache_options: bool = False
    """Whether the command's help lists the options of every cache."""
    takes_model_options: bool = False
    """Whether the command takes the options that only some models have."""


def add_source_options(add: Callable[..., Any]) -> None:
    """Adds the options that say which files a model is read from.

    Args:
        add: The ``add_argument`` of a parser.
    """
    add(
        "--transformer",
        metavar="FILE",
        help="the transformer's weights, and whatever else the file holds, instead of "
        "the model's: safetensors or GGUF, as of ComfyUI",
    )
    add("--variant", help="weight files' variant, for example fp16")
    add("--revision", help="branch, tag or commit of a model of the hub")


def source_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what these options say, as ``open_model`` takes it."""
    return {name: getattr(args, name) for name in _SOURCE}


def add_lora_option(add: Callable[..., Any]) -> None:
    """Adds the option that merges LoRAs into the model.

    Args:
        add: The ``add_argument`` of a parser.
    """
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA to merge into the model, as diffusers, Kohya, ComfyUI or XLabs name "
        "its tensors; may be repeated",
    )


def merged_loras(args: argparse.Namespace) -> Loras:
    """Returns the files that this option names, each with its weight.

    Raises:
        RequestError: One is given twice, or a weight is none.
    """
    from ..core.loras import as_lora_files, lora_from_text

    given = [lora_from_text("--lora", text) for text in map(typed, args.lora)]
    return as_lora_files("--lora", given)


def add_picture_options(add: Callable[..., Any]) -> None:
    """Adds the options that name pictures to start from.

    Args:
        add: The ``add_argument`` of a parser.
    """
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="start from this PNG, JPEG or WebP; its size is drawn unless another is "
        "given, in as many pixels as the model draws by default if it has more; "
        "repeated for models that take several",
    )
    add(
        "--mask",
        metavar="FILE",
        help="draw only where it is white, or, of one with transparency, where it is "
        "transparent; of the image's size",
    )
    add(
        "--strength",
        type=float,
        metavar="SHARE",
        help="of the image that is lost in noise, and of the steps that are run; above "
        "0 to 1, default 0.6",
    )


def starting_pictures(args: argparse.Namespace) -> PictureInputs | None:
    """Returns the pictures that these options name, read; ``None`` without any.

    Raises:
        RequestError: One cannot be read, or a mask or a strength is without an image.
    """
    if not args.image and args.mask is None and args.strength is None:
        return None
    from ..media.pictures import read_inputs

    return read_inputs(args.image or None, args.mask, args.strength)


def add_loading_options(add: Callable[..., Any]) -> None:
    """Adds the options that say how a model is loaded.

    Args:
        add: The ``add_argument`` of a parser.
    """
    add_source_options(add)
    add("--height", type=int, help="pixels; default: the model's")
    add("--width", type=int, help="pixels; default: the model's")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:INDEX")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: by device and weights",
    )
    add("--json", action="store_true", help="print the result as JSON")
    add("--debug", action="store_true", help="show tracebacks of errors")


def add_running_options(add: Callable[..., Any]) -> None:
    """Adds the options that say where compiled graphs are, and how they run.

    Args:
        add: The ``add_argument`` of a parser.
    """
    add(
        "--precompiled",
        action="append",
        default=[],
        metavar="DIR",
        help="folder that compile has written: machine code, so it must be yours; may "
        "be repeated",
    )
    add(
        "--require-precompiled",
        action="store_true",
        help="fail at once where graphs would have to be compiled for minutes",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="that compute on the CPU; default: one a CPU, in a container as many as "
        "it may use",
    )
    add(
        "--offload-text-encoders",
        action="store_true",
        help="keep text encoders in memory only while they encode",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only some models have, in a group of their own.

    Args:
        parser: Parser of a command that draws with one model.
    """
    from ..pipelines.families import declared_by_all

    group = parser.add_argument_group("options of some models only")
    for name, declared in declared_by_all().items():
        flag, dest = f"--{name.replace('_', '-')}", f"{_MODEL_OPTION}{name}"
        text = declared.help.replace("%", "%%")
        if declared.kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, dest=dest, action=action, help=text)
        else:
            unit = declared.kind.__name__.upper()
            group.add_argument(
                flag, dest=dest, type=declared.kind, metavar=unit, help=text
            )


def model_options(args: argparse.Namespace) -> dict[str, object]:
    """Returns what was given of the options of :func:`add_model_options`."""
    return {
        name.removeprefix(_MODEL_OPTION): (
            typed(value) if isinstance(value, str) else value
        )
        for name, value in vars(args).items()
        if name.startswith(_MODEL_OPTION) and value is not None
    }
