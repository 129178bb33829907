"""The plain data that passes between the stages of a request.

Dimensions, in docstrings, graph types and tests alike: ``B`` batch, ``S_img`` and
``S_txt`` tokens, ``C`` channels, ``D`` model width, ``H, W`` pixels, ``h, w`` latent
cells. ``sigma`` is 0..1, ``timestep`` what the model receives (0..1000), ``step`` a
0-based index: three different words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError
from .grid import Grid
from .loras import Loras, as_loras
from .noise import RequestNoise, checked_seed
from .options import RequestOptions
from .pictures import PictureInputs
from .validation import not_negative, text, whole

if TYPE_CHECKING:
    from ..caches import AbstractCacheConfig, BoundCache

# Of one request; more is a slip of the keyboard, and would fill the memory.
MAX_IMAGES = 10_000
MAX_SIZE = 16_384
MAX_STEPS = 10_000


@dataclass(frozen=True)
class PromptTexts:
    """The texts that a model's text encoders read, one of each per prompt."""

    first: tuple[str, ...]
    """The text of each prompt for the first text encoder: the prompts themselves."""
    second: tuple[str, ...]
    """The text of each prompt for the second text encoder."""

    @classmethod
    def same(cls, text: str, count: int) -> PromptTexts:
        """Creates the texts of ``count`` prompts, all ``text`` for all encoders."""
        return cls((text,) * count, (text,) * count)


@dataclass(frozen=True)
class GenerationRequest:
    """What a caller asks for; checked as far as no model is needed.

    ``None`` is the model's default.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | tuple[str, ...] | None = None
    """Prompt of the unconditional branch: one for all prompts, or one for each."""
    height: int | None = None
    """Height of each image in pixels."""
    width: int | None = None
    """Width of each image in pixels."""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    """Guidance input of a guidance-distilled model; costs no time, and has no effect on
    other models."""
    true_cfg_scale: float | None = None
    """Weight of classifier-free guidance, which takes a second pass per step; 1 is
    off."""
    seed: int = 0
    """Seed of the noise: all images share its stream, as diffusers' do with one
    generator, so that one of several differs from the same image drawn alone."""
    num_images_per_prompt: int = 1
    sigmas: tuple[float, ...] | None = None
    """The caller's own schedule of sigmas, decreasing in (0, 1], without the final
    0."""
    cache: AbstractCacheConfig | None = None
    cache_memory_limit: int | None = None
    """Most bytes that the cache's state may take on the device; ``None`` for no
    limit."""
    prompt_2: str | tuple[str, ...] | None = None
    """What a second text encoder reads instead of the prompt: one text for all prompts,
    or one for each. As in diffusers, a single empty text is the prompt again."""
    negative_prompt_2: str | tuple[str, ...] | None = None
    """What a second text encoder reads instead of the negative prompt: one text for all
    prompts, or one for each."""
    seeds: tuple[int, ...] | None = None
    """One seed per image in place of ``seed``, like a list of generators in diffusers:
    each image is then the same when it is drawn alone."""
    loras: Loras = ()
    """LoRAs by the names that the model was loaded with, each with its weight."""
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    """Options that only some models have, by the names that the model's
    ``options_class`` declares; the model checks them."""
    inputs: PictureInputs | None = None
    """Pictures to start from, of models that take them; ``None`` draws from text
    alone."""
    is_timed: bool = False
    """Whether the report has the milliseconds of each step on a GPU too, which is then
    waited for twice a step. On a CPU it always has them."""

    @property
    def num_images(self) -> int:
        """Number of images of all prompts together."""
        return len(self.prompts) * self.num_images_per_prompt

    @property
    def texts(self) -> PromptTexts:
        """The texts that the text encoders read for the prompts."""
        return PromptTexts(self.prompts, self._of_each(self.prompt_2 or self.prompts))

    @property
    def negative_texts(self) -> PromptTexts | None:
        """The texts that the text encoders read for the negative prompts, if any."""
        if self.negative_prompt is None:
            return None
        second = self.negative_prompt_2 or self.negative_prompt
        return PromptTexts(self._of_each(self.negative_prompt), self._of_each(second))

    def noise(self) -> RequestNoise:
        """Returns the streams of the request's noise, at their beginning."""
        return RequestNoise(self.seeds or (self.seed,), self.num_images)

    def _of_each(self, texts: str | tuple[str, ...]) -> tuple[str, ...]:
        return (texts,) * len(self.prompts) if isinstance(texts, str) else texts

    def __post_init__(self) -> None:
        """Checks the types and ranges of all fields."""
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
        ):
            if size is not None:
                limit = MAX_STEPS if name == "num_inference_steps" else MAX_SIZE
                whole(f"request: {name}", size, minimum=1, maximum=limit)
        count = whole(
            "request: num_images_per_prompt", self.num_images_per_prompt, minimum=1
        )
        if count * len(self.prompts) > MAX_IMAGES:
            raise RequestError(
                f"request: {count * len(self.prompts)} pictures asked for at once, at "
                f"most {MAX_IMAGES} are drawn; ask several times"
            )
        checked_seed(self.seed)
        if self.seeds is not None:
            self._check_seeds(self.seeds)
        if self.cache_memory_limit is not None:
            whole("request: cache_memory_limit", self.cache_memory_limit, minimum=0)
        if not isinstance(self.loras, tuple) or as_loras(
            "request: loras", self.loras
        ) != tuple(self.loras):
            raise RequestError(
                f"request: loras must be a tuple of names with their weights, got "
                f"{self.loras!r:.80}"
            )
        if not isinstance(self.options, Mapping):
            raise RequestError(
                f"request: options must be values by name, got {self.options!r}"
            )
        if self.guidance_scale is not None:
            not_negative("request: guidance_scale", self.guidance_scale)
        if self.true_cfg_scale is not None:
            not_negative("request: true_cfg_scale", self.true_cfg_scale)
        if self.inputs is not None and not isinstance(self.inputs, PictureInputs):
            raise RequestError(
                "request: inputs must be PictureInputs, got "
                f"{type(self.inputs).__name__}"
            )
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
class PictureToEncode:
    """What the autoencoder's encoder is given."""

    pixels: np.ndarray
    """float32 ``(1, H, W, 3)`` in -1..1."""
    posterior: np.ndarray
    """Standard normal noise of the encoder's distribution, float32
    ``(1 or B, h, w, C)``: one draw for all samples, or one for each; zeros give the
    distribution's mode."""


@dataclass(frozen=True)
class KnownPicture:
    """What a model that fills pictures in reads beside each token's latents."""

    picture: PictureToEncode
    """The picture, without what is drawn anew, at the size that is drawn."""
    mask: np.ndarray
    """1 in the pixels that are drawn anew, a token's side by side: float32
    ``(S_img, cell * cell)``."""


@dataclass(frozen=True)
class GivenPictures:
    """The pictures that a request brings, as numbers: what each is used for."""

    start: PictureToEncode | None = None
    """What noise is added to, at the size that is drawn; ``None`` starts from noise
    alone."""
    kept_mask: np.ndarray | None = None
    """1 in what is drawn anew and 0 in what is put back of the start after each step,
    packed as latents are: float32 ``(S_img, C)``; ``None`` puts nothing back."""
    known: KnownPicture | None = None
    """What the transformer reads in channels beside the latents."""
    references: tuple[PictureToEncode, ...] = ()
    """What it reads in tokens behind those that are drawn, each at a size of its
    own."""

    @property
    def to_encode(self) -> tuple[PictureToEncode, ...]:
        """All that is encoded."""
        known = None if self.known is None else self.known.picture
        return tuple(x for x in (self.start, known, *self.references) if x is not None)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All arrays of numbers that are held."""
        masks = self.kept_mask, None if self.known is None else self.known.mask
        return (
            *(x for one in self.to_encode for x in (one.pixels, one.posterior)),
            *(mask for mask in masks if mask is not None),
        )

    @property
    def marks_nothing(self) -> bool:
        """Whether there is a mask, and it leaves nothing to draw."""
        mask = self.kept_mask if self.known is None else self.known.mask
        return mask is not None and not mask.any()


@dataclass(frozen=True)
class GenerationContext:
    """A request as numbers, whatever the model; no device is needed to make one."""

    tokens: Mapping[str, np.ndarray]
    """Token ids of each prompt by text encoder, int64 ``(P, S)``."""
    negative_tokens: Mapping[str, np.ndarray] | None
    """Token ids of the negative prompts by text encoder, int64 ``(P, S)``; ``None``
    without true guidance."""
    text_tokens: int
    """Number of tokens ``S_txt`` that the transformer reads of each prompt."""
    latents: np.ndarray
    """Seeded noise, packed, float32 ``(B, S_img, C)`` with
    ``B = P * num_images_per_prompt``."""
    options: RequestOptions
    """Options that only some models have."""
    num_frames: int
    """Number of frames of each sample; 1 for images."""
    fps: float | None
    """Frames per second; ``None`` for images."""
    grid: Grid
    """How the image tokens of a sample are arranged."""
    cache: BoundCache
    """The cache that runs the steps."""
    sigmas: np.ndarray
    """Noise level before each step that is run, float32 ``(steps + 1,)``, ending in
    0."""
    timesteps: np.ndarray
    """What the model receives at each step that is run, float32 ``(steps,)``,
    0..1000."""
    height: int
    """Height of each image in pixels."""
    width: int
    """Width of each image in pixels."""
    num_inference_steps: int
    """Number of denoising steps of the whole schedule; of one that starts from a
    picture only the last are run, as many as ``timesteps`` has."""
    guidance_scale: float
    """Input of the model's guidance embedding; 0 if it has none."""
    true_cfg_scale: float = 1.0
    """Weight of classifier-free guidance; 1 is off."""
    num_images_per_prompt: int = 1
    seed: int | None = None
    """Seed that the noise was drawn from; ``None`` if there was none."""
    seeds: tuple[int, ...] | None = None
    """One seed per sample in place of ``seed``."""
    loras: Loras = ()
    """LoRAs with their weights, as the model's ``adapters`` know the choice."""
    is_timed: bool = False
    """Whether each step is timed on a GPU too."""
    given: GivenPictures | None = None
    """The pictures that the request brings; ``None`` draws from text alone."""
    references: tuple[Grid, ...] = ()
    """How the tokens of each reference picture are arranged."""
    images: tuple[str, ...] = ()
    """SHA-256 of each picture that the request brings, in hexadecimal."""
    mask: str | None = None
    """SHA-256 of its mask; ``None`` without one."""
    strength: float | None = None
    """How much of the schedule is run from a picture; ``None`` without one, or where
    all of it is."""
    warnings: tuple[str, ...] = ()
    """What the caller should know, one line each; empty if there is nothing."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Source of each setting that the request left open, by the setting's name."""

    @property
    def reference_tokens(self) -> int:
        """Number of tokens of all reference pictures."""
        return sum(grid.num_tokens for grid in self.references)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of its arrays, in the memory of the host."""
        ids = (*self.tokens.values(), *(self.negative_tokens or {}).values())
        arrays = [self.latents, *ids]
        if self.given is not None:
            arrays += self.given.arrays
        return sum(array.nbytes for array in arrays)
