"""``max-diffusion generate``, in a process of its own and as far as its job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import processes

from max_diffusion.cli.generate import resolve
from max_diffusion.cli.main import parse as parse_words

# Beside the interpreter, as installed: this is what people type.
COMMAND = [str(Path(sys.executable).with_name("max-diffusion")), "generate"]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return processes.run(*COMMAND, *arguments, **options)


def parse(*arguments: str) -> Any:
    return resolve(parse_words(["generate", *arguments]))
