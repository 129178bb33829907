"""What settings are called: diffusers' names, and the short forms beside them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

SHORT_FORMS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
        "true_cfg_scale": "true_cfg",
        "num_images_per_prompt": "num_images",
    }
)
"""Short forms by diffusers' name, which Python, reports and files use. The command line
takes both, and so does HTTP, where the last is called ``n``, as OpenAI has it."""


RESERVED: Final = frozenset(
    (
        # Of the command line.
        *(
            "batch",
            "budget",
            "cache",
            "cache_file",
            "cache_option",
            "caches",
            "calibration",
        ),
        *("command", "debug", "fewer_steps", "lpips", "max_seconds", "prompts_file"),
        *("runs", "target_psnr", "target_speedup", "validation_file"),
        *(
            "device",
            "dtype",
            "files",
            "help",
            "image",
            "json",
            "like",
            "lora",
            "model",
            "no_true_guidance",
            "num_images",
            "offload_text_encoders",
            "output",
            "precompiled",
            "require_precompiled",
            "threads",
            "true_guidance",
        ),
        *("plugin", "plugins", "prompts", "revision", "run", "timeline", "variant"),
        # Of HTTP, and of the class that reads its bodies.
        *("background", "cache_options", "construct", "copy", "dict", "from_orm"),
        *("guidance", "moderation", "n", "options", "output_compression"),
        *("output_format", "parse_file", "parse_obj", "parse_raw", "partial_images"),
        *("pixels", "priority", "progress", "prompt", "quality", "report"),
        *("response_format", "safety_identifier", "schema", "schema_json", "size"),
        *("steps", "stream", "style", "timeout", "true_cfg", "update_forward_refs"),
        *("user", "validate", "warnings", "others", "option_names", "seconds"),
        "input_reference",
        # Of Python and of reports.
        *("full_passes", "kwargs", "on_step", "picture", "self", "total_passes"),
    )
)
"""What options of a model family may not be called, beside the settings that every
request and every report has."""


def flags(name: str) -> tuple[str, ...]:
    """The options of the command line that give a setting, the short one first."""
    names = (SHORT_FORMS[name], name) if name in SHORT_FORMS else (name,)
    return tuple(f"--{each.replace('_', '-')}" for each in names)
