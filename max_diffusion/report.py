"""What a run did, step by step, in a form that programs read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One step of one guidance branch."""

    step: int
    """0-based index."""
    branch: str
    """``conditional`` or ``unconditional``."""
    sigma: float
    timestep: float
    actions: tuple[str, ...]
    """``compute``, ``predict`` or ``reuse``, one a sample."""
    signal: tuple[float, ...] | None
    """What the decision was based on, one a sample, if on anything."""
    milliseconds: float


@dataclass(frozen=True)
class RunReport:
    """One call of ``generate``."""

    model: str
    device: str
    dtype: str
    prompts: tuple[str, ...]
    negative_prompt: str | None
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    seed: int
    num_images: int
    cache: Mapping[str, object]
    """Name and settings."""
    steps: tuple[StepRecord, ...]
    cache_bytes: int
    """Most bytes of cache state held at once."""
    load_seconds: float
    compile_seconds: float
    compile_count: int
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    total_seconds: float
    """Of this call; load and compile come before it."""
    warnings: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def total_passes(self) -> int:
        """Transformer passes without a cache: steps x branches x samples."""
        return sum(len(record.actions) for record in self.steps)

    @property
    def full_passes(self) -> int:
        """Transformer passes really computed."""
        return sum(record.actions.count("compute") for record in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not finite becomes ``None``."""
        plain: dict[str, Any] = _plain(asdict(self))
        plain["full_passes"] = self.full_passes
        plain["total_passes"] = self.total_passes
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
