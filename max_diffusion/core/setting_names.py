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


def flags(name: str) -> tuple[str, ...]:
    """The options of the command line that give a setting, the short one first."""
    names = (SHORT_FORMS[name], name) if name in SHORT_FORMS else (name,)
    return tuple(f"--{each.replace('_', '-')}" for each in names)
