"""What a run did, step by step, in a form that programs read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """What one denoising step did in one guidance branch."""

    step: int
    """0-based index of the step."""
    branch: str
    """The guidance branch: ``conditional`` or ``unconditional``."""
    sigma: float
    """Noise level that the step starts from, 0 to 1."""
    timestep: float
    """Timestep that the model received, 0 to 1000."""
    actions: tuple[str, ...]
    """What was done, one word per sample: ``compute`` (all of the transformer),
    ``predict`` (none of it), ``reuse`` (without the middle blocks), ``partial`` (blocks
    with known attention or modules) or ``estimate`` (from the other branch)."""
    signal: tuple[float, ...] | None
    """What the decision was based on, one value per sample; ``None`` if it was based on
    none."""
    milliseconds: float | None
    """Wall time of this branch's part of the step, without guidance and sampler; in an
    engine, with what it ran of other requests meanwhile. ``None`` where it was not
    timed: on a GPU, unless asked for."""
    is_time_shared: bool = False
    """Whether the branches ran as one: ``milliseconds`` are then of all of them
    together, and the same in each one's record."""


@dataclass(frozen=True)
class RunReport:
    """What one call of ``generate`` was asked for, what it did and how long it took."""

    model: str
    """The model as it was asked for: ``demo``, a folder or a repo id."""
    device: str
    """Kind of device that ran the model: ``cpu`` or ``gpu``."""
    dtype: str
    """Compute dtype of the transformer."""
    prompts: tuple[str, ...]
    """The prompts as given; each has ``num_images / len(prompts)`` images."""
    negative_prompt: str | tuple[str, ...] | None
    """Prompt of the unconditional branch, one for all prompts or one for each; ``None``
    if there was no such branch."""
    height: int
    """Height of each image in pixels."""
    width: int
    """Width of each image in pixels."""
    num_inference_steps: int
    """Number of denoising steps of the whole schedule. From a picture only its last
    were run, those that ``steps`` has."""
    guidance_scale: float | None
    """Guidance input of a guidance-distilled model; ``None`` if the model has no such
    input."""
    true_cfg_scale: float
    """Weight of classifier-free guidance; 1 is off."""
    seed: int
    """Seed of the noise, whose one stream all images of a batch share. Where each image
    has its own seed, see ``seeds``, this is the first of them."""
    num_images: int
    """Number of images of all prompts together."""
    image_tokens: int
    """Number of image tokens of each image."""
    text_tokens: int
    """Number of tokens that the transformer reads of each prompt, padding included."""
    cache: Mapping[str, object]
    """Name of the denoising cache, as ``name``, and its options."""
    steps: tuple[StepRecord, ...]
    """Records of the steps in the order they ran: by step, then by branch."""
    cache_bytes: int
    """Most bytes of cache state held at once."""
    load_seconds: float
    """Seconds for reading files and handing weights to the device."""
    compile_seconds: float
    """Seconds for compiling, or for reading compiled graphs."""
    compile_count: int
    """Number of modules compiled since the pipeline was created, or found in MAX's
    cache; those that were read from files of their own do not count."""
    encode_seconds: float
    """Seconds that the text encoders took, and encoding a picture."""
    denoise_seconds: float
    """Seconds that all denoising steps took together."""
    decode_seconds: float
    """Seconds for decoding the latents to images."""
    total_seconds: float
    """Wall time of this call in seconds; loading and compiling come before it."""
    warnings: tuple[str, ...]
    """What the caller should know, one line each; empty if there is nothing."""
    versions: Mapping[str, str]
    """Versions of the packages that ran, by distribution name."""
    sigmas: tuple[float, ...] | None = None
    """The caller's own schedule of sigmas; ``None`` if there was none."""
    seeds: tuple[int, ...] = ()
    """Seed of each image, where each has its own; else empty."""
    prompt_2: str | tuple[str, ...] | None = None
    """What the second text encoder read instead of the prompts; ``None`` if no other
    text was given."""
    negative_prompt_2: str | tuple[str, ...] | None = None
    """What the second text encoder read instead of the negative prompt; ``None`` if no
    other text was given."""
    loras: Mapping[str, float] = field(default_factory=dict)
    """Weight of each LoRA, by the file that was merged at load or the name that the
    request chose it by."""
    transformer: str | None = None
    """The file that the transformer, and what else it holds, was read from; ``None`` if
    that is the model's own."""
    images: tuple[str, ...] = ()
    """SHA-256 of the pixels of each picture that the request started from; none drew
    from text alone."""
    mask: str | None = None
    """The same of the mask; ``None`` if there was none."""
    strength: float | None = None
    """How much of the schedule was run from the picture; ``None`` without one."""
    reference_tokens: int = 0
    """Number of tokens of reference pictures that the transformer reads with those of
    each image; 0 without any."""
    sampler: str = ""
    """Name of the sampler, such as ``FlowMatchEuler``; empty if it is not known."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Options that only some models have, as asked for or the model's own choice; in
    JSON they stand beside all other fields."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Source of each setting that the request left open, by the setting's name."""

    def seed_of(self, picture: int) -> int:
        """Returns the seed of the image at an index, or of the stream it shares."""
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
    def num_steps(self) -> int:
        """Number of denoising steps that were run."""
        return len({record.step for record in self.steps})

    @property
    def total_passes(self) -> int:
        """Number of transformer passes without a cache: steps x branches x samples."""
        return sum(len(record.actions) for record in self.steps)

    @property
    def full_passes(self) -> int:
        """Number of transformer passes that were computed in full."""
        return sum(record.actions.count("compute") for record in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in JSON's types; what is not finite becomes ``None``."""
        found: dict[str, Any] = plain(self)
        found |= found.pop("options")
        found["full_passes"] = self.full_passes
        found["total_passes"] = self.total_passes
        return found


def plain(value: Any) -> Any:
    """Converts dataclasses and containers to JSON's types.

    Numbers that are not finite become ``None``.
    """
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
