"""A pipeline whose pictures and times are functions of the setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np

from max_diffusion import RequestError
from max_diffusion.caches import AbstractCacheConfig, NoCacheConfig
from max_diffusion.core.report import RunReport, StepRecord
from max_diffusion.core.request import GenerationRequest
from max_diffusion.pipelines.outputs import GenerationResult

STEPS = 20
SIZE = 16
OFF = 8
"""What each wrong value is off, save one."""
Behaviour = Callable[[AbstractCacheConfig, int, str], tuple[float, float]]
"""Cache, steps and prompt to the seconds of a picture and its squared error."""


def halving(cache: AbstractCacheConfig, steps: int, prompt: str) -> tuple[float, float]:
    """A tenth of a second a step; a cache takes half of it, and is not quite alike."""
    if isinstance(cache, NoCacheConfig):
        return steps / 10, float(STEPS - steps)
    return steps / 20, 0.5


class Painter:
    """What ``compare`` and ``tune`` ask of a pipeline.

    ``now`` is its clock: only drawing takes time. ``drawn`` is what it drew, in order.
    Of a video each frame has the squared error once more than the one before.
    """

    default_num_inference_steps = STEPS
    default_size = (SIZE, SIZE)

    def __init__(
        self,
        behave: Behaviour = halving,
        names: Sequence[str] = ("taylorseer", "auto"),
    ) -> None:
        self.pipeline_config = SimpleNamespace(path=None, class_name="Painter")
        self.names = names
        self.behave = behave
        self.loaded: tuple[AbstractCacheConfig, ...] = ()
        self.now = 0.0
        self.drawn: list[GenerationRequest] = []
        self.contexts: list[GenerationRequest] = []

    @property
    def caches(self) -> Painter:
        return self

    def resolve(self, cache: AbstractCacheConfig) -> AbstractCacheConfig:
        return cache

    def bind(self, cache: AbstractCacheConfig, steps: int) -> None:
        if cache.name not in ("none", *self.names):
            raise RequestError(f"cache: no {cache.name} here")
        cache.required_steps(steps)

    def create_context(self, request: GenerationRequest) -> SimpleNamespace:
        self.contexts.append(request)
        if request.height is not None and request.height % 16:
            raise RequestError(f"height must be a multiple of 16, got {request.height}")
        return SimpleNamespace(
            height=request.height or SIZE, width=request.width or SIZE
        )

    def draw(
        self,
        request: GenerationRequest,
        *,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> GenerationResult:
        assert request.cache is not None
        assert request.num_inference_steps is not None
        steps, [prompt] = request.num_inference_steps, request.prompts
        seconds, error = self.behave(request.cache, steps, prompt)
        for step in range(steps):
            self.now += seconds / steps
            on_step(step + 1, steps)
        self.drawn.append(request)
        num_frames = int(str(request.options.get("num_frames", 1)))
        frames = np.stack([frame_of(request.seed, i) for i in range(num_frames)])
        for index, frame in enumerate(frames):
            frame += _off(error * (1 + index)).reshape(frame.shape)
        report = report_of(request, steps, seconds)
        return GenerationResult(frames[None], report, 8.0 if num_frames > 1 else None)


def picture_of(seed: int) -> np.ndarray:
    """What is drawn without an error, uint8 ``(SIZE, SIZE, 3)``."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256 - OFF, (SIZE, SIZE, 3), dtype=np.uint8)


def frame_of(seed: int, index: int) -> np.ndarray:
    """A frame of what is drawn without an error; the first is the picture."""
    return picture_of(seed + 1000 * index)


def is_computed(cache: AbstractCacheConfig, step: int) -> bool:
    """What a cache decides here."""
    return isinstance(cache, NoCacheConfig) or step % 2 == 0


def report_of(request: GenerationRequest, steps: int, seconds: float) -> RunReport:
    """Every other step of a cache is forecast."""
    cache = request.cache
    assert cache is not None
    is_plain = isinstance(cache, NoCacheConfig)
    actions = ["compute" if is_computed(cache, i) else "predict" for i in range(steps)]
    return RunReport(
        model="painter",
        device="cpu",
        dtype="float32",
        prompts=request.prompts,
        negative_prompt=None,
        height=SIZE,
        width=SIZE,
        num_inference_steps=steps,
        guidance_scale=3.5,
        true_cfg_scale=1.0,
        seed=request.seed,
        num_images=1,
        image_tokens=1,
        text_tokens=1,
        cache={"name": cache.name, **asdict(cache)},
        steps=tuple(
            StepRecord(i, "conditional", 0.5, 500.0, (action,), None, 1.0)
            for i, action in enumerate(actions)
        ),
        cache_bytes=0 if is_plain else 1024 * request.seed,
        load_seconds=0.0,
        compile_seconds=0.0,
        compile_count=0,
        encode_seconds=0.0,
        denoise_seconds=seconds,
        decode_seconds=0.0,
        total_seconds=seconds,
        warnings=(),
        versions={"max-diffusion": "0"},
    )


def decibels(error: float) -> float:
    """PSNR of a picture that is drawn with this squared error."""
    found = np.mean(_off(error).astype(float) ** 2)
    return math.inf if found == 0 else 10 * math.log10(255**2 / found)


def _off(error: float) -> np.ndarray:
    """What is added to a picture's values for about this mean squared error."""
    off = np.zeros(SIZE * SIZE * 3, np.uint8)
    whole, rest = divmod(round(error * off.size), OFF**2)
    off[:whole] = OFF
    if rest:
        off[whole] = math.isqrt(rest)
    return off
