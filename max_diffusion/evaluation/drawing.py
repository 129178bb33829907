"""What is drawn to judge caches by: prompts with seeds, and settings for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from ..caches import CACHES, CacheConfig, NoCacheConfig, cache_name, label_of
from ..checks import text, whole
from ..errors import RequestError
from ..noise import checked_seed
from ..report import plain
from ..text_to_image import GenerationResult, TextToImagePipeline, named_cache
from ..types import GenerationRequest

OnProgress = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and with what is being done."""
BASELINE: Final = "no cache"


@dataclass(frozen=True)
class Setting:
    """A cache and a number of steps."""

    cache: CacheConfig
    num_inference_steps: int
    label: str

    @classmethod
    def without_cache(cls, num_inference_steps: int, label: str = "") -> Setting:
        """So many steps, each computed."""
        plural = "s" if num_inference_steps > 1 else ""
        words = label or f"{num_inference_steps} step{plural}"
        return cls(NoCacheConfig(), num_inference_steps, words)

    @classmethod
    def with_cache(cls, cache: CacheConfig, num_inference_steps: int) -> Setting:
        """A cache, labelled by its name and what differs from its defaults."""
        return cls(cache, num_inference_steps, label_of(cache))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the cache by name, and all of its options."""
        return {
            "label": self.label,
            "cache": cache_name(self.cache),
            "options": plain(asdict(self.cache)),
            "num_inference_steps": self.num_inference_steps,
        }


@dataclass(frozen=True)
class Scenes:
    """Prompts to draw, each alone, with noise of its own."""

    requests: tuple[GenerationRequest, ...]
    """Without a cache."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Texts alone."""
        return tuple(request.prompts[0] for request in self.requests)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.requests)


def scenes_of(
    prompts: str | Sequence[str],
    num_inference_steps: int | None,
    *,
    seed: int = 0,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Scenes:
    """Checks what is to be drawn as far as no model is needed.

    Raises:
        RequestError: No prompts, or a value out of range.
    """
    texts = (prompts,) if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts:
        raise RequestError(f"prompts: expected at least one, got {prompts!r}")
    for words in texts:
        text("prompts: each", words)
    repeated = next((t for i, t in enumerate(texts) if t in texts[:i]), None)
    if repeated is not None:
        raise RequestError(f"prompts: {repeated!r} is there twice; give each once")
    if num_inference_steps is not None:
        whole("num_inference_steps", num_inference_steps, minimum=1)
    first = checked_seed(seed)
    return Scenes(
        tuple(
            GenerationRequest(
                prompts=(words,),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                seed=first + index,
            )
            for index, words in enumerate(texts)
        )
    )


def runnable_caches(
    pipeline: TextToImagePipeline,
    caches: Sequence[str | CacheConfig] | None,
    num_inference_steps: int,
) -> tuple[tuple[CacheConfig, ...], Mapping[str, str]]:
    """Configurations of the caches named, or of all that the pipeline can run.

    Returns:
        These, and why not of each that was left out because nobody named it.

    Raises:
        RequestError: One that was named is unknown, there twice, or cannot be run.
    """
    if caches is None:
        found, refused = [], {}
        for name, kind in CACHES.items():
            if kind is NoCacheConfig:
                continue
            try:
                pipeline.check_cache(kind(), num_inference_steps)
                found.append(kind())
            except RequestError as err:
                refused[name] = str(err)
        return tuple(found), MappingProxyType(refused)
    if isinstance(caches, str) or not isinstance(caches, Sequence):
        raise RequestError(
            f"caches: expected a sequence of names and configurations, got {caches!r}"
        )
    configs = tuple(
        pipeline.resolve_cache(named_cache(item) if isinstance(item, str) else item)
        for item in caches
    )
    for index, config in enumerate(configs):
        if isinstance(config, NoCacheConfig):
            raise RequestError("caches: none is drawn anyway; leave it out")
        if config in configs[:index]:
            raise RequestError(
                f"caches: {label_of(config)} is there twice; give each once"
            )
        pipeline.check_cache(config, num_inference_steps)
    return configs, MappingProxyType({})


class Drawing:
    """Draws, and tells how far it is.

    Args:
        pipeline: What draws.
        on_progress: Called at each step; what it raises ends the drawing.
    """

    def __init__(
        self, pipeline: TextToImagePipeline, on_progress: OnProgress | None
    ) -> None:
        self._pipeline = pipeline
        self._on_progress = on_progress
        self.num_drawn = 0
        self.planned = 1
        """Pictures in all, as far as is known."""

    def draw(self, setting: Setting, request: GenerationRequest) -> GenerationResult:
        """One picture."""

        def on_step(done: int, total: int) -> None:
            if self._on_progress:
                share = (self.num_drawn + done / total) / self.planned
                self._on_progress(min(1.0, share), setting.label)

        wanted = replace(
            request,
            cache=setting.cache,
            num_inference_steps=setting.num_inference_steps,
        )
        result = self._pipeline.draw(wanted, on_step=on_step)
        self.num_drawn += 1
        return result

    def check(self, settings: Iterable[Setting], scenes: Scenes) -> None:
        """Raises :class:`RequestError` now rather than in the middle."""
        for setting in settings:
            self._pipeline.check_cache(setting.cache, setting.num_inference_steps)
        for request in scenes.requests:
            self._pipeline.create_context(request)
