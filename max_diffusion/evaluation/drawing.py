"""What is drawn to judge caches by: prompts with seeds, and settings for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from ..caches import (
    CACHES,
    AbstractCacheConfig,
    DenoisingCacheConfig,
    NoCacheConfig,
    cache_from_options,
    label_of,
)
from ..core.loras import GivenLoras, as_loras
from ..core.noise import checked_seed
from ..core.pictures import PictureInputs
from ..core.report import plain
from ..core.request import GenerationContext, GenerationRequest
from ..core.validation import text, whole
from ..errors import RequestError
from ..pipelines.arguments import picture_inputs
from ..pipelines.outputs import GenerationResult
from ..pipelines.starting import steps_run
from ..pipelines.text_to_image import TextToImagePipeline

if TYPE_CHECKING:
    from ..media.pictures import PictureLike

OnProgress = Callable[[float, str], None]
"""Function that is called with the share that is done, 0 to 1, and with what is being
done."""
BASELINE: Final = "no cache"
NO_OPTIONS: Final[Mapping[str, object]] = MappingProxyType({})
"""None of the options that only some models have."""


def noun_of(num_frames: int) -> str:
    """Returns what texts call so many frames: ``picture`` or ``video``."""
    return "video" if num_frames > 1 else "picture"


@dataclass(frozen=True)
class Setting:
    """A cache and a number of steps: how an image is drawn."""

    cache: AbstractCacheConfig
    """The cache with its options."""
    num_inference_steps: int
    """Number of denoising steps."""
    label: str
    """Name of the setting in tables and charts."""

    @classmethod
    def without_cache(cls, num_inference_steps: int, label: str = "") -> Setting:
        """Creates the setting of a number of steps, each computed in full."""
        plural = "s" if num_inference_steps > 1 else ""
        words = label or f"{num_inference_steps} step{plural}"
        return cls(NoCacheConfig(), num_inference_steps, words)

    @classmethod
    def with_cache(
        cls, cache: AbstractCacheConfig, num_inference_steps: int
    ) -> Setting:
        """Creates the setting of a cache, labelled as ``--caches`` takes it."""
        return cls(cache, num_inference_steps, label_of(cache))

    def to_dict(self) -> dict[str, Any]:
        """Returns the setting in JSON's types: the cache's name and all its options."""
        return {
            "label": self.label,
            "cache": self.cache.name,
            "options": plain(asdict(self.cache)),
            "num_inference_steps": self.num_inference_steps,
        }


@dataclass(frozen=True)
class Scenes:
    """Prompts to draw, each alone, with noise of its own, from the same pictures."""

    requests: tuple[GenerationRequest, ...]
    """One request per prompt, without a cache."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, in the order of the requests."""
        return tuple(request.prompts[0] for request in self.requests)

    @property
    def inputs(self) -> PictureInputs | None:
        """The pictures that every request starts from; ``None`` without any."""
        return self.requests[0].inputs

    def steps_run(self, pipeline: TextToImagePipeline, num_inference_steps: int) -> int:
        """Returns how many steps of a whole schedule the pictures leave to be run.

        Args:
            pipeline: The pipeline that is to draw.
            num_inference_steps: Number of steps of the whole schedule.

        Raises:
            RequestError: They leave none.
        """
        return steps_run(pipeline, self.requests[0], num_inference_steps)

    def __len__(self) -> int:
        """Returns the number of prompts."""
        return len(self.requests)


def scenes_of(
    prompts: str | Sequence[str],
    num_inference_steps: int | None,
    *,
    seed: int = 0,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    image: PictureLike | Sequence[PictureLike] | None = None,
    mask: PictureLike | None = None,
    strength: float | None = None,
    loras: GivenLoras | None = None,
    options: Mapping[str, object] = NO_OPTIONS,
) -> Scenes:
    """Checks what is to be drawn, as far as no model is needed.

    Args:
        prompts: One or several, each drawn alone.
        num_inference_steps: Denoising steps; ``None`` leaves them to the pipeline.
        seed: Seed of the first prompt's noise; each further prompt has the next.
        guidance_scale: Input of a guidance-distilled model.
        height: Height of the images in pixels; default the model's.
        width: Width of the images in pixels; default the model's.
        image: Picture that every prompt starts from; several for models that take them.
        mask: What of it is drawn anew.
        strength: How much of the schedule is run from it.
        loras: LoRAs by the names that the model was loaded with.
        options: What only some models have, by name, which the model checks.

    Returns:
        A request for each prompt.

    Raises:
        RequestError: No prompts, a picture that cannot be read, or a value out of
            range.
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
    inputs = picture_inputs(image, mask, strength)
    chosen = as_loras("loras", loras)
    return Scenes(
        tuple(
            GenerationRequest(
                prompts=(words,),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                seed=first + index,
                inputs=inputs,
                loras=chosen,
                options=options,
            )
            for index, words in enumerate(texts)
        )
    )


def as_keywords(inputs: PictureInputs | None) -> dict[str, Any]:
    """Returns pictures that are read as the keywords of whatever draws from some."""
    if inputs is None:
        return {}
    return {"image": inputs.images, "mask": inputs.mask, "strength": inputs.strength}


def runnable_caches(
    pipeline: TextToImagePipeline,
    caches: Sequence[str | DenoisingCacheConfig | AbstractCacheConfig] | None,
    num_steps: int,
) -> tuple[tuple[AbstractCacheConfig, ...], Mapping[str, str]]:
    """Returns the caches named, or all that the pipeline can run.

    Args:
        pipeline: The pipeline that is to run them.
        caches: Names or configurations; ``None`` for every registered cache.
        num_steps: Denoising steps that are run.

    Returns:
        The configurations; and, by name, why each cache cannot be run that was left
        out, which happens only where nobody named it.

    Raises:
        RequestError: One that was named is unknown, there twice, or cannot be run.
    """
    if caches is None:
        found, refused = [], {}
        for name, kind in CACHES.items():
            if kind is NoCacheConfig:
                continue
            try:
                pipeline.caches.bind(kind(), num_steps)
                found.append(kind())
            except RequestError as err:
                refused[name] = str(err)
        return tuple(found), MappingProxyType(refused)
    if isinstance(caches, str) or not isinstance(caches, Sequence):
        raise RequestError(
            f"caches: expected a sequence of names and configurations, got {caches!r}"
        )
    configs = tuple(
        cache_from_options(item)
        if isinstance(item, str)
        else pipeline.caches.resolve(item)
        for item in caches
    )
    # That is drawn in any case: the others are compared with it.
    configs = tuple(each for each in configs if not isinstance(each, NoCacheConfig))
    for index, config in enumerate(configs):
        if config in configs[:index]:
            raise RequestError(
                f"caches: {label_of(config)} is there twice; give each once"
            )
        pipeline.caches.bind(config, num_steps)
    return configs, MappingProxyType({})


class Drawing:
    """Draws images, and tells how far it is.

    Args:
        pipeline: The pipeline that draws.
        on_progress: Called at each step; what it raises ends the drawing.
    """

    def __init__(
        self, pipeline: TextToImagePipeline, on_progress: OnProgress | None
    ) -> None:
        self._pipeline = pipeline
        self._on_progress = on_progress
        self.num_drawn = 0
        """Number of images drawn so far."""
        self.planned = 1
        """Number of images to draw in all, as far as is known."""

    def draw(self, setting: Setting, request: GenerationRequest) -> GenerationResult:
        """Draws one image or video with a setting.

        Args:
            setting: Cache and number of steps, which replace the request's.
            request: A request of one prompt.
        """

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

    def check(
        self, settings: Iterable[Setting], scenes: Scenes
    ) -> list[GenerationContext]:
        """Checks all that is to be drawn now rather than in the middle.

        Returns:
            The context of each scene.

        Raises:
            RequestError: The pipeline cannot run a setting or draw a scene.
        """
        pipeline = self._pipeline
        for setting in settings:
            steps = scenes.steps_run(pipeline, setting.num_inference_steps)
            pipeline.caches.bind(setting.cache, steps)
        return [pipeline.create_context(request) for request in scenes.requests]
