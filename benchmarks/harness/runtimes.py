"""What is measured against what: runtimes, their environments, and their caches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from max_diffusion.caches import AbstractCacheConfig, Calibration
from max_diffusion.errors import MaxDiffusionError

from .artefact_cache import digest, made_once

OURS: Final = "max_diffusion"


class PeerError(MaxDiffusionError):
    """A peer cannot be run; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A Python of its own for peers, with what they need."""

    name: str
    """Name of its folder."""
    requirements: tuple[str, ...]
    """What pip installs."""

    def python(self, work: Path, *, may_install: bool) -> Path:
        """The path of its interpreter, which is made first if need be.

        Args:
            work: Folder in which all environments are kept.
            may_install: Whether it may be made, which downloads up to a few GB.

        Raises:
            PeerError: The environment is not there and may not be made, or cannot be.
        """
        folder = work / "environments" / self.name
        of = digest((sys.version, *self.requirements))
        try:
            made_once(folder, of, self._install if may_install else None)
        except FileNotFoundError as err:
            raise PeerError(
                "its environment is not made; run once without --quick"
            ) from err
        return folder / "bin" / "python"

    def _install(self, folder: Path) -> None:
        python = folder / "bin" / "python"
        _run([sys.executable, "-m", "venv", str(folder)], "venv")
        pip = [str(python), "-m", "pip", "install", "--upgrade"]
        _run([*pip, "pip>=26"], "pip")
        _run([*pip, *self.requirements], "pip")
        # Optional to both, but one built for another torch breaks their import.
        try:
            _run([str(python), "-c", "import torchvision"], "torchvision")
        except PeerError:
            _run([str(python), "-m", "pip", "uninstall", "-y", "torchvision"], "pip")


def environment() -> dict[str, str]:
    """Environment variables for other Pythons.

    They are as they were when this process began: MAX changes them in place, out of
    Python's sight, and what inherits them looks for packages here.
    """
    return dict(os.environ)


def _run(line: list[str], what: str) -> None:
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, check=False, env=environment()
        )
    except OSError as err:
        raise PeerError(f"{what} failed: {err.strerror}") from err
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        errors = [word for word in words if word.lower().startswith("error")]
        raise PeerError(f"{what} failed: {(errors or words)[-1][:300]}")


TORCH: Final = Environment(
    "torch",
    (
        "torch==2.13.*",
        "diffusers==0.42.*",
        "transformers>=5",
        "sentencepiece",
        "protobuf",
    ),
)
OPENVINO: Final = Environment(
    "openvino",
    (
        "openvino-genai==2026.4.*",
        "optimum-intel==2.2.*",
        "torch==2.13.*",
        "diffusers",
        "sentencepiece",
    ),
)


@dataclass(frozen=True)
class Runtime:
    """One way to draw images."""

    name: str
    """What tables call it, without the dtype."""
    worker: str
    """Name of the file in ``workers`` that draws with it."""
    dtype: str
    """Compute dtype: ``float32`` or ``bfloat16``."""
    environment: Environment | None = None
    """The Python that it needs; ``None`` for the one that runs the benchmark."""
    caches: tuple[str, ...] = ()
    """The caches that it has, by our names."""
    is_compiled: bool = False
    """Whether ``torch.compile`` compiles it."""

    @property
    def label(self) -> str:
        """Name and dtype, which tell it from all others."""
        return f"{self.name} {self.dtype}"

    @property
    def compiles(self) -> bool:
        """Whether a first run does what later ones need not do again."""
        return self.is_compiled or self.environment is not TORCH

    @property
    def is_ours(self) -> bool:
        """Whether it is what is measured against the others."""
        return self.name == OURS


_DIFFUSERS_CACHES = ("taylorseer", "first-block", "magcache", "pab", "fastercache")
_OUR_CACHES = (*_DIFFUSERS_CACHES, "auto", "step-mask")
RUNTIMES: Final = (
    Runtime(OURS, "draw_ours.py", "float32", caches=_OUR_CACHES),
    Runtime(
        "diffusers eager", "draw_diffusers.py", "float32", TORCH, _DIFFUSERS_CACHES
    ),
    Runtime("torch.compile", "draw_diffusers.py", "float32", TORCH, is_compiled=True),
    Runtime("OpenVINO", "draw_openvino.py", "float32", OPENVINO, ("taylorseer",)),
    Runtime(OURS, "draw_ours.py", "bfloat16", caches=("taylorseer",)),
    Runtime("diffusers eager", "draw_diffusers.py", "bfloat16", TORCH, ("taylorseer",)),
    Runtime("torch.compile", "draw_diffusers.py", "bfloat16", TORCH, is_compiled=True),
    Runtime("OpenVINO", "draw_openvino.py", "bfloat16", OPENVINO, ("taylorseer",)),
)


NOT_ASKED: Final = (
    "torch.compile with diffusers' caches: not asked for",
    "bfloat16 with caches other than TaylorSeer, and compiled anew: not asked for",
    "the large model with other caches, and its first picture: not asked for",
    "diffusers has no cache like auto and step-mask, OpenVINO has TaylorSeer only",
)
"""What is not measured, and why."""


def exported(
    folder: Path, of: str, target: Path, python: Path, *, may_export: bool
) -> Path:
    """A model's folder as OpenVINO reads it, made once by optimum-intel.

    Args:
        folder: The model's folder in the diffusers layout.
        of: Digest of the model.
        target: Folder in which to keep what is exported.
        python: Interpreter of the environment :data:`OPENVINO`.
        may_export: Whether it may be exported, which takes a minute or more.

    Returns:
        ``target``.

    Raises:
        PeerError: The model cannot be exported, or is not there and may not be.
    """

    def export(target: Path) -> None:
        line = [str(python.with_name("optimum-cli")), "export", "openvino"]
        line += ["--model", str(folder), "--task", "text-to-image"]
        line += ["--weight-format", "fp32", str(target)]
        _run(line, "optimum-cli export openvino")

    try:
        made = digest((of, *OPENVINO.requirements))
        return made_once(target, made, export if may_export else None)
    except FileNotFoundError as err:
        raise PeerError("its model is not exported; run once without --quick") from err


def described(
    cache: AbstractCacheConfig, calibration: Calibration
) -> Mapping[str, Any]:
    """What workers are told of a cache: its name, its options and what it needs."""
    found: dict[str, Any] = {"name": cache.name, "options": asdict(cache)}
    if found["name"] == "magcache":
        found["ratios"] = calibration.magcache_ratios
    return MappingProxyType(found)
