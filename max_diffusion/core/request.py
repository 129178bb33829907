"""The plain data that passes between the stages of a request.

Dimensions, in docstrings, graph types and tests alike: ``B`` batch, ``S_img`` and
``S_txt`` tokens, ``C`` channels, ``D`` model width, ``H, W`` pixels, ``h, w`` latent
cells. ``sigma`` is 0..1, ``timestep`` what the model receives (0..1000), ``step`` a
0-based index: three different words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError
from .grid import Grid
from .noise import checked_seed
from .validation import not_negative, text, whole

if TYPE_CHECKING:
    from ..caches import AbstractCacheConfig, BoundCache

# Of one request; more is a slip of the keyboard, and would fill the memory.
MAX_PICTURES = 10_000
MAX_SIZE = 16_384
MAX_STEPS = 10_000


@dataclass(frozen=True)
class PromptTexts:
    """What a model's text encoders read of each prompt."""

    first: tuple[str, ...]
    """The prompts."""
    second: tuple[str, ...]
    """What a second text encoder reads in their place."""

    @classmethod
    def same(cls, text: str, count: int) -> PromptTexts:
        """One text for so many prompts, and for all encoders."""
        return cls((text,) * count, (text,) * count)


@dataclass(frozen=True)
class GenerationRequest:
    """What a caller asks for; checked as far as no model is needed.

    ``None`` is the model's default.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | tuple[str, ...] | None = None
    """One of all prompts, or one of each."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """Input of a guidance-distilled model; costs nothing. Without effect on others."""
    true_cfg_scale: float | None = None
    """Classifier-free guidance with a second pass a step; 1 is off."""
    seed: int = 0
    """Of the noise: all pictures share its stream, as diffusers' do with one generator,
    so that one of several is another when it is drawn alone."""
    num_images_per_prompt: int = 1
    sigmas: tuple[float, ...] | None = None
    """A schedule of the caller's, decreasing in (0, 1], without the final 0."""
    cache: AbstractCacheConfig | None = None
    cache_memory_limit: int | None = None
    """Most bytes that the cache's state may take on the device."""
    prompt_2: str | tuple[str, ...] | None = None
    """What a second text encoder reads instead of the prompt: one of all prompts, or
    one of each. As in diffusers, a single empty text is the prompt again."""
    negative_prompt_2: str | tuple[str, ...] | None = None
    """The same of the negative prompt."""
    seeds: tuple[int, ...] | None = None
    """A seed of each picture, in place of ``seed``, as a list of generators in
    diffusers: each is then the same when it is drawn alone."""
    max_sequence_length: int | None = None
    """Tokens that the model reads of each prompt, padding included."""
    is_timed: bool = False
    """Whether the report has the milliseconds of each step on a GPU too, which is then
    waited for twice a step. On a CPU it always has them."""

    @property
    def num_images(self) -> int:
        """All prompts together."""
        return len(self.prompts) * self.num_images_per_prompt

    @property
    def texts(self) -> PromptTexts:
        """What the text encoders read, one of each prompt."""
        return PromptTexts(self.prompts, self._of_each(self.prompt_2 or self.prompts))

    @property
    def negative_texts(self) -> PromptTexts | None:
        """What they read of the negative prompts, if there are any."""
        if self.negative_prompt is None:
            return None
        second = self.negative_prompt_2 or self.negative_prompt
        return PromptTexts(self._of_each(self.negative_prompt), self._of_each(second))

    def _of_each(self, texts: str | tuple[str, ...]) -> tuple[str, ...]:
        return (texts,) * len(self.prompts) if isinstance(texts, str) else texts

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        if isinstance(self.prompts, str) or not self.prompts:
            raise RequestError(
                "request: prompts must be a tuple of at least one prompt, got "
                f"{self.prompts!r}"
            )
        for prompt in self.prompts:
            text("request: a prompt", prompt)
        for name, texts in (
            ("negative_prompt", self.negative_prompt),
            ("prompt_2", self.prompt_2),
            ("negative_prompt_2", self.negative_prompt_2),
        ):
            if texts is not None:
                self._check_texts(name, texts)
        for name, size in (
            ("height", self.height),
            ("width", self.width),
            ("num_inference_steps", self.num_inference_steps),
            ("max_sequence_length", self.max_sequence_length),
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
        if self.seeds is not None:
            self._check_seeds(self.seeds)
        if self.cache_memory_limit is not None:
            whole("request: cache_memory_limit", self.cache_memory_limit, minimum=0)
        if self.guidance_scale is not None:
            not_negative("request: guidance_scale", self.guidance_scale)
        if self.true_cfg_scale is not None:
            not_negative("request: true_cfg_scale", self.true_cfg_scale)
        if not isinstance(self.is_timed, bool):
            raise RequestError(
                f"request: is_timed must be True or False, got {self.is_timed!r}"
            )

    def _check_texts(self, name: str, texts: str | tuple[str, ...]) -> None:
        if not isinstance(texts, tuple):
            text(f"request: {name}", texts)
            return
        if len(texts) != len(self.prompts):
            raise RequestError(
                f"request: {name} must be one text, or as many as there are prompts, "
                f"{len(self.prompts)}; got {len(texts)}"
            )
        for one in texts:
            text(f"request: each {name}", one)

    def _check_seeds(self, seeds: tuple[int, ...]) -> None:
        if not isinstance(seeds, tuple):
            raise RequestError(f"request: seeds must be a tuple, got {seeds!r}")
        if len(seeds) != self.num_images:
            raise RequestError(
                f"request: {len(seeds)} seeds for pictures: {self.num_images}; give "
                "one for each, or a single seed for one stream of noise"
            )
        for seed in seeds:
            checked_seed(seed)


@dataclass(frozen=True)
class GenerationContext:
    """A request as numbers, whatever the model; no device is needed to make one."""

    tokens: Mapping[str, np.ndarray]
    """Ids of each prompt by text encoder, int64 ``(P, S)``."""
    negative_tokens: Mapping[str, np.ndarray] | None
    """The same of the negative prompts, with true guidance only."""
    text_tokens: int
    """That the transformer reads of each prompt, ``S_txt``."""
    latents: np.ndarray
    """Seeded noise, packed, float32 ``(B, S_img, C)`` with
    ``B = P * num_images_per_prompt``."""
    grid: Grid
    """Where the image tokens lie."""
    cache: BoundCache
    """What runs the steps."""
    sigmas: np.ndarray
    """float32 ``(num_inference_steps + 1,)``, ending in 0."""
    timesteps: np.ndarray
    """float32 ``(num_inference_steps,)``, 0..1000."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_inference_steps: int
    """Denoising steps."""
    guidance_scale: float
    """What a guidance embedding is told; 0 where there is none."""
    true_cfg_scale: float = 1.0
    """Weight of classifier-free guidance; 1 is off."""
    num_images_per_prompt: int = 1
    seed: int | None = None
    """Of the noise, if it was drawn from one."""
    is_timed: bool = False
    """Whether each step is timed on a GPU too."""
    warnings: tuple[str, ...] = ()
    """What the caller should know, one line each."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Where each setting comes from that the request left open, by its name."""
