"""Who draws for a server: one engine in this process, or others elsewhere."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, Self, final

from ...core.options import declared_options
from ...core.request import GenerationRequest
from ...engine import Engine, Event, Failed, Finished, RequestHandle, SubmitOptions
from ...errors import RequestError
from ...media.writers import DEFAULT_FPS
from ...pipelines.context import options_of
from ...pipelines.text_to_image import TextToImagePipeline
from .errors import ApiError
from .metrics import Metrics
from .schemas import Health

Status = Literal["loading", "ready", "draining", "failed"]
# Where a family's option has no maximum.
_MOST_FRAMES: Final = 4096


@dataclass(frozen=True)
class VideoDescription:
    """What requests may ask of a model that draws videos."""

    num_frames: int
    """Frames of what is drawn if a request does not say how many; 1 is an image."""
    fps: float
    """Frames a second of a video whose request does not say how many."""
    counts: tuple[int, ...]
    """All numbers of frames that the model draws, ascending from 2."""

    def within(self, max_frames: int) -> VideoDescription:
        """Returns what requests may ask of a server that limits the frames.

        Args:
            max_frames: Most frames of a video. One that does not say how many has the
                most that there may be, if the model's own number is above it; where the
                model draws none so short, it stays, for the request to be refused.
        """
        counts = tuple(count for count in self.counts if count <= max_frames)
        own = self.num_frames
        if own > max_frames and counts:
            own = counts[-1]
        return replace(self, num_frames=own, counts=counts)

    @classmethod
    def of(cls, pipeline: TextToImagePipeline) -> VideoDescription | None:
        """Describes the videos of a loaded pipeline; ``None`` if it has none."""
        frames = pipeline.frames_of(pipeline.options_class())
        declared = declared_options(pipeline.options_class).get("num_frames")
        if frames.count == 1 and declared is None:
            return None
        counts: tuple[int, ...] = (frames.count,)
        if declared is not None:
            most = int(declared.maximum or _MOST_FRAMES)
            counts = tuple(n for n in range(2, most + 1) if _draws(pipeline, n))
        return cls(frames.count, frames.fps or DEFAULT_FPS, counts)


def _draws(pipeline: TextToImagePipeline, num_frames: int) -> bool:
    """Whether a pipeline draws videos of just so many frames."""
    try:
        pipeline.frames_of(options_of(pipeline, {"num_frames": num_frames}))
    except RequestError:
        return False
    return True


@dataclass(frozen=True)
class ModelDescription:
    """What requests may ask of a model."""

    default_size: tuple[int, int]
    """Default width and height of images in pixels."""
    default_steps: int
    caches: Mapping[str, Mapping[str, Any]]
    """Options, with their defaults, of each cache that requests may name."""
    cache_summaries: Mapping[str, str]
    """One sentence about each of these caches, by name."""
    default_cache: str
    default_cache_options: Mapping[str, Any]
    options: tuple[str, ...]
    """Names of the options that only some models have, and this one does."""
    loras: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the matrices that each LoRA that requests may choose changes, by
    name."""
    inputs: tuple[str, ...] = ()
    """What requests may bring of image, mask and strength; nothing where the graphs
    for pictures are not compiled."""
    needed_inputs: tuple[str, ...] = ()
    """What of these every request must bring."""
    max_pictures: int = 1
    """Most pictures that a request brings."""
    preferred_sizes: tuple[tuple[int, int], ...] = ()
    """Heights and widths of which the nearest in shape is drawn where an edit names no
    size; none where its picture's own is."""
    most_read_pixels: int | None = None
    """Most pixels of each picture, where they are read at their own sizes."""
    default_strength: float | None = None
    """Strength of requests with pictures that do not say; ``None`` where it is no
    input."""
    video: VideoDescription | None = None
    """Where it draws videos; ``None`` where it draws images alone."""

    @classmethod
    def of(cls, pipeline: TextToImagePipeline) -> ModelDescription:
        """Describes the model of a loaded pipeline."""
        height, width = pipeline.default_size
        caches = pipeline.caches.supported()
        default = pipeline.cache_config
        return cls(
            default_size=(width, height),
            default_steps=pipeline.default_num_inference_steps,
            caches={name: asdict(config) for name, config in caches.items()},
            cache_summaries={name: config.summary for name, config in caches.items()},
            default_cache=default.name,
            default_cache_options=asdict(default),
            options=tuple(declared_options(pipeline.options_class)),
            loras={
                name: pipeline.adapters.num_bytes(((name, 1.0),))
                for name in pipeline.adapters.names
            },
            video=VideoDescription.of(pipeline),
            **_pictures_of(pipeline),
        )


def _pictures_of(pipeline: TextToImagePipeline) -> dict[str, Any]:
    """What is said of pictures; nothing where their graphs are not compiled."""
    pictures = pipeline.pictures
    if pictures is None or not pipeline.graphs.has_pictures:
        return {}
    has_strength = "strength" in pictures.taken
    return {
        "inputs": tuple(sorted(pictures.taken)),
        "needed_inputs": tuple(sorted(pictures.needed)),
        "max_pictures": pictures.max_pictures,
        "preferred_sizes": pictures.preferred_sizes,
        "most_read_pixels": pictures.most_read_pixels,
        "default_strength": pictures.default_strength if has_strength else None,
    }


class Events(ABC):
    """Iterates over what becomes of a request, until its last event.

    Whoever has one closes it, in a ``finally`` or as ``contextlib.aclosing`` does. It
    is an object and no generator, since closing a generator that was never begun runs
    none of its code, and so would leave the request of a client that left early.
    """

    def __aiter__(self) -> Self:
        """Returns the iterator itself."""
        return self

    @abstractmethod
    async def __anext__(self) -> Event:
        """Waits for the next event; the last is ``Finished`` or ``Failed``."""

    @abstractmethod
    async def aclose(self) -> None:
        """Cancels the request, unless it is done; may be called more than once."""


class Backend(ABC):
    """Draws pictures and videos for a server, and says how it stands."""

    @abstractmethod
    async def draw(self, request: GenerationRequest, options: SubmitOptions) -> Events:
        """Puts a request in the queue; called once there is a description.

        One that is cancelled while it waits leaves no request behind.

        Returns:
            The request's events; closing them cancels it.

        Raises:
            ApiError: The request cannot be drawn now.
            MaxDiffusionError: The request was refused.
        """

    @abstractmethod
    async def describe(self) -> ModelDescription | None:
        """Returns what requests may ask; ``None`` while that is not known."""

    @abstractmethod
    async def health(self, model: str) -> Health:
        """Returns how the server stands, with ``model`` as the served model's id."""

    @abstractmethod
    async def metrics(self) -> bytes:
        """Returns figures in Prometheus's text format."""


@final
class LocalBackend(Backend):
    """Draws with one engine in this process, which may still be loading."""

    def __init__(self) -> None:
        self._metrics = Metrics()
        self._engine: Engine | None = None
        self._description: ModelDescription | None = None
        self._status: Status = "loading"
        self._detail = "the model is being loaded and compiled"

    @property
    def observer(self) -> Metrics:
        """Observer to give to the engine, which counts for the metrics."""
        return self._metrics

    def open(self, engine: Engine) -> None:
        """Gives the loaded engine, so that requests are drawn from now on."""
        seconds = engine.pipeline.seconds
        self._metrics.watch(engine.stats, seconds["load"], seconds["compile"])
        self._description = ModelDescription.of(engine.pipeline)
        self._engine = engine
        self._status, self._detail = "ready", ""

    def drain(self) -> None:
        """Refuses requests from now on."""
        self._status, self._detail = "draining", "the server is shutting down"

    async def draw(self, request: GenerationRequest, options: SubmitOptions) -> Events:
        """Submits the request to the engine."""
        engine = self._engine
        status, detail = self._now()
        if engine is None or status != "ready":
            raise ApiError(
                503, f"server: {detail}", code=status, headers={"Retry-After": "5"}
            )
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def listener(event: Event) -> None:
            if not loop.is_closed():  # else nobody is there to hear
                loop.call_soon_threadsafe(events.put_nowait, event)

        # Tokenizing and drawing noise take milliseconds, which others need not wait.
        submitting = asyncio.ensure_future(
            asyncio.to_thread(engine.submit, request, options, listener=listener)
        )
        try:
            handle = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_submitted)  # no thread can be stopped
            raise
        return _EngineEvents(handle, events)

    async def describe(self) -> ModelDescription | None:
        """Returns what requests may ask; ``None`` before :meth:`open`."""
        return self._description

    async def health(self, model: str) -> Health:
        """Returns how the server stands, with the engine's figures."""
        status, detail = self._now()
        figures = asdict(self._engine.stats()) if self._engine else {}
        return Health(status=status, detail=detail, model=model, **figures)

    async def metrics(self) -> bytes:
        """Returns the engine's figures in Prometheus's text format."""
        return self._metrics.text()

    def _now(self) -> tuple[Status, str]:
        engine = self._engine
        if engine is not None and self._status == "ready" and not engine.is_alive:
            return "failed", "the engine has stopped; its log says why"
        return self._status, self._detail


@final
class _EngineEvents(Events):
    """The events of one request of an engine in this process."""

    def __init__(self, handle: RequestHandle, events: asyncio.Queue[Event]) -> None:
        self._handle, self._events = handle, events
        self._is_over = False

    async def __anext__(self) -> Event:
        """Waits for the next event."""
        if self._is_over:
            raise StopAsyncIteration
        event = await self._events.get()
        self._is_over = isinstance(event, Finished | Failed)
        return event

    async def aclose(self) -> None:
        """Cancels the request."""
        self._is_over = True
        self._handle.cancel()


def _cancel_submitted(submitting: asyncio.Future[RequestHandle]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
