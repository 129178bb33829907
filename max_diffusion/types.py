"""The plain data that passes between the stages of a request.

Dimensions, in docstrings, graph types and tests alike: ``B`` batch, ``S_img`` and
``S_txt`` tokens, ``C`` channels, ``D`` model width, ``H, W`` pixels, ``h, w`` latent
cells. ``sigma`` is 0..1, ``timestep`` what the model receives (0..1000), ``step`` a
0-based index: three different words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .caches import AbstractCacheConfig, BoundCache
from .checks import not_negative, text, whole
from .errors import RequestError
from .noise import checked_seed

# Of one request; more is a slip of the keyboard, and would fill the memory.
MAX_PICTURES = 10_000
MAX_SIZE = 16_384
MAX_STEPS = 10_000


@dataclass(frozen=True)
class GenerationRequest:
    """What a caller asks for; checked as far as no model is needed.

    ``None`` is the model's default.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None = None
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """Input of a guidance-distilled model; costs nothing."""
    true_cfg_scale: float = 1.0
    """Classifier-free guidance with a second pass a step; 1 is off."""
    seed: int = 0
    num_images_per_prompt: int = 1
    sigmas: tuple[float, ...] | None = None
    """A schedule of the caller's, decreasing in (0, 1], without the final 0."""
    cache: AbstractCacheConfig | None = None
    cache_memory_limit: int | None = None
    """Most bytes that the cache's state may take on the device."""

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        if isinstance(self.prompts, str) or not self.prompts:
            raise RequestError(
                "request: prompts must be a tuple of at least one prompt, got "
                f"{self.prompts!r}"
            )
        for prompt in self.prompts:
            text("request: a prompt", prompt)
        if self.negative_prompt is not None:
            text("request: negative_prompt", self.negative_prompt)
        for name, size in (
            ("height", self.height),
            ("width", self.width),
            ("num_inference_steps", self.num_inference_steps),
        ):
            if size is not None:
                limit = MAX_STEPS if name == "num_inference_steps" else MAX_SIZE
                whole(f"request: {name}", size, minimum=1, maximum=limit)
        count = whole(
            "request: num_images_per_prompt", self.num_images_per_prompt, minimum=1
        )
        if count * len(self.prompts) > MAX_PICTURES:
            raise RequestError(
                f"request: {count * len(self.prompts)} pictures asked for at once, at "
                f"most {MAX_PICTURES} are drawn; ask several times"
            )
        checked_seed(self.seed)
        if self.cache_memory_limit is not None:
            whole("request: cache_memory_limit", self.cache_memory_limit, minimum=0)
        if self.guidance_scale is not None:
            not_negative("request: guidance_scale", self.guidance_scale)
        not_negative("request: true_cfg_scale", self.true_cfg_scale)


@dataclass(frozen=True)
class GenerationContext:
    """A request as numbers, by the field names of MAX's ``PixelContext``."""

    tokens: np.ndarray
    """First tokenizer's ids of each prompt, int64 ``(P, S)``."""
    tokens_2: np.ndarray
    """Second tokenizer's ids, int64 ``(P, S_txt)``."""
    negative_tokens: np.ndarray | None
    """Ids of the negative prompt, int64 ``(P, S)``, with true guidance only."""
    negative_tokens_2: np.ndarray | None
    cache: BoundCache
    """What runs the steps."""
    latents: np.ndarray
    """Seeded noise, packed, float32 ``(B, S_img, C)`` with
    ``B = P * num_images_per_prompt``."""
    sigmas: np.ndarray
    """float32 ``(num_inference_steps + 1,)``, ending in 0."""
    timesteps: np.ndarray
    """float32 ``(num_inference_steps,)``, 0..1000."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float = 1.0
    num_images_per_prompt: int = 1
    seed: int | None = None
    request_id: str = ""
    warnings: tuple[str, ...] = ()
