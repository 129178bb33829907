"""What a run did, step by step, in a form that programs read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One step of one guidance branch."""

    step: int
    """0-based index."""
    branch: str
    """``conditional`` or ``unconditional``."""
    sigma: float
    """Noise level the step starts from, 0 to 1."""
    timestep: float
    """What the model received, 0 to 1000."""
    actions: tuple[str, ...]
    """One a sample: ``compute`` (all of the transformer), ``predict`` (none of it),
    ``reuse`` (without the middle blocks), ``partial`` (blocks with known attention or
    modules) or ``estimate`` (from the other branch)."""
    signal: tuple[float, ...] | None
    """What the decision was based on, one a sample, if on anything."""
    milliseconds: float | None
    """Wall time of this branch's part of the step, without guidance and sampler; in an
    engine, with what it ran of other requests meanwhile. ``None`` where it was not
    timed: on a GPU, unless asked for."""
    is_time_shared: bool = False
    """Whether the branches ran as one: ``milliseconds`` are then of all of them
    together, and the same in each one's record."""


@dataclass(frozen=True)
class RunReport:
    """One call of ``generate``."""

    model: str
    """As it was asked for: ``demo``, a folder or a repo id."""
    device: str
    """``cpu`` or ``gpu``."""
    dtype: str
    """Compute dtype of the transformer."""
    prompts: tuple[str, ...]
    """As given; each has ``num_images / len(prompts)`` pictures."""
    negative_prompt: str | tuple[str, ...] | None
    """Prompt of the unconditional branch, if there was one: of all prompts, or of
    each."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_inference_steps: int
    """Denoising steps."""
    guidance_scale: float | None
    """Input of a guidance-distilled model; ``None`` if it has no such input."""
    true_cfg_scale: float
    """Weight of classifier-free guidance; 1 is off."""
    seed: int
    """Of the noise: the pictures of a batch share one stream, unless ``seeds`` tells
    each one's own; it is then the first of them."""
    num_images: int
    """Pictures, all prompts together."""
    image_tokens: int
    """Of each picture."""
    text_tokens: int
    """That the transformer reads of each prompt, padding included."""
    cache: Mapping[str, object]
    """Name and settings."""
    steps: tuple[StepRecord, ...]
    """In the order they ran: by step, then by branch."""
    cache_bytes: int
    """Most bytes of cache state held at once."""
    load_seconds: float
    """Reading files and handing weights to the device."""
    compile_seconds: float
    """Compiling, or finding the compiled graphs on disk."""
    compile_count: int
    """Compiles since the pipeline was made."""
    encode_seconds: float
    """Text encoders."""
    denoise_seconds: float
    """All steps."""
    decode_seconds: float
    """Latents to pictures."""
    total_seconds: float
    """Of this call; load and compile come before it."""
    warnings: tuple[str, ...]
    """What the caller should know, one line each."""
    versions: Mapping[str, str]
    """Versions of the packages that ran, by distribution name."""
    sigmas: tuple[float, ...] | None = None
    """The caller's own schedule, if there was one."""
    seeds: tuple[int, ...] = ()
    """Of each picture, where each has its own; else empty."""
    prompt_2: str | tuple[str, ...] | None = None
    """What the second text encoder read instead of the prompts, if anything."""
    negative_prompt_2: str | tuple[str, ...] | None = None
    """The same of the negative prompt."""
    max_sequence_length: int | None = None
    """Tokens that were asked for of each prompt, or the model's own number."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Where each setting comes from that the request left open, by its name."""

    def seed_of(self, picture: int) -> int:
        """The seed of one picture, or of the stream that it shares."""
        return self.seeds[picture] if self.seeds else self.seed

    @property
    def step_milliseconds(self) -> dict[int, float]:
        """Wall time of each step that was timed, all its branches together."""
        totals: dict[int, float] = {}
        for record in self.steps:
            is_counted = record.is_time_shared and record.step in totals
            if record.milliseconds is not None and not is_counted:
                before = totals.get(record.step, 0.0)
                totals[record.step] = before + record.milliseconds
        return totals

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
        found: dict[str, Any] = plain(self)
        found["full_passes"] = self.full_passes
        found["total_passes"] = self.total_passes
        return found


def plain(value: Any) -> Any:
    """Dataclasses and containers to JSON's types; what is not finite to ``None``."""
    # dataclasses.asdict would deep-copy mappings, which a read-only one refuses.
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    # NumPy's scalars are numbers too, but json knows only Python's.
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    return value
