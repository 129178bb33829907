"""A backend whose pictures are functions of the seed, for servers without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
from painters import picture_of, report_of

from max_diffusion.caches import NoCacheConfig
from max_diffusion.core.request import GenerationRequest
from max_diffusion.engine import Event, Failed, Finished, StepTaken, SubmitOptions
from max_diffusion.errors import MaxDiffusionError
from max_diffusion.pipelines.outputs import GenerationResult
from max_diffusion.serving.http import (
    Backend,
    ModelDescription,
    ServerSettings,
    create_app,
)
from max_diffusion.serving.http.backend import Events, VideoDescription
from max_diffusion.serving.http.schemas import Health

STEPS = 3


class Sketch(Events):
    """Of one request: its steps, and its picture."""

    def __init__(
        self,
        request: GenerationRequest,
        pause: float,
        num_frames: int = 1,
        fps: float | None = None,
    ) -> None:
        self._pause = pause
        report = report_of(replace(request, cache=NoCacheConfig()), STEPS, 0.1)
        steps: list[Event] = [
            StepTaken(record.step + 1, STEPS, (record,)) for record in report.steps
        ]
        frames = picture_of(request.seed)[None, None].repeat(num_frames, axis=1)
        self.left = [*steps, Finished(GenerationResult(frames, report, fps))]
        self.is_closed = False

    async def __anext__(self) -> Event:
        if not self.left or self.is_closed:
            raise StopAsyncIteration
        await asyncio.sleep(self._pause)
        return self.left.pop(0)

    async def aclose(self) -> None:
        self.is_closed = True


class Sketcher(Backend):
    """Draws at once, or after pauses.

    ``drawn`` and ``sketches`` are what it was asked, and what became of it. Of pictures
    it takes ``inputs``, and must be brought ``needed_inputs``; with ``video`` it draws
    these instead.
    """

    def __init__(
        self,
        *,
        queue_pause: float = 0.0,
        pause: float = 0.0,
        refusal: Exception | None = None,
        failure: MaxDiffusionError | None = None,
        inputs: tuple[str, ...] = (),
        needed_inputs: tuple[str, ...] = (),
        max_pictures: int = 1,
        most_read_pixels: int | None = None,
        options: tuple[str, ...] = (),
        video: VideoDescription | None = None,
    ) -> None:
        self._inputs, self._needed_inputs = inputs, needed_inputs
        self._max_pictures, self._most_read_pixels = max_pictures, most_read_pixels
        self._options, self._video = options, video
        self._queue_pause, self._pause = queue_pause, pause
        self._refusal, self._failure = refusal, failure
        self.drawn: list[tuple[GenerationRequest, SubmitOptions]] = []
        self.sketches: list[Sketch] = []
        self.num_abandoned = 0

    async def draw(self, request: GenerationRequest, options: SubmitOptions) -> Events:
        try:
            await asyncio.sleep(self._queue_pause)
        except asyncio.CancelledError:
            self.num_abandoned += 1
            raise
        if self._refusal is not None:
            raise self._refusal
        self.drawn.append((request, options))
        sketch = Sketch(request, self._pause)
        if self._video is not None:
            told: Any = {"num_frames": self._video.num_frames, "fps": self._video.fps}
            sketch = Sketch(request, self._pause, **told | request.options)
        if self._failure is not None:
            sketch.left[-1] = Failed(self._failure)
        self.sketches.append(sketch)
        return sketch

    async def describe(self) -> ModelDescription | None:
        return ModelDescription(
            *(
                (128, 128),
                50,
                {"none": {}},
                {"none": "Draws."},
                "none",
                {},
                self._options,
            ),
            loras={"style": 100},
            inputs=self._inputs,
            needed_inputs=self._needed_inputs,
            max_pictures=self._max_pictures,
            most_read_pixels=self._most_read_pixels,
            default_strength=0.6 if "strength" in self._inputs else None,
            video=self._video,
        )

    async def health(self, model: str) -> Health:
        return Health(status="ready", model=model)

    async def metrics(self) -> bytes:
        return b"figures 1\n"


@asynccontextmanager
async def asking(backend: Backend, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in this process, without a socket."""
    app = create_app(backend, ServerSettings(**settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client


async def ask(
    backend: Backend,
    method: str,
    path: str,
    *,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> httpx.Response:
    """One request."""
    async with asking(backend, **(settings or {})) as client:
        return await client.request(method, path, **options)


def post(body: Any, backend: Backend | None = None, **options: Any) -> httpx.Response:
    """One request for a picture."""
    path = "/v1/images/generations"
    return asyncio.run(ask(backend or Sketcher(), "POST", path, json=body, **options))


def asked(body: dict[str, Any]) -> tuple[GenerationRequest, dict[str, Any]]:
    """What a body came to, and the answer to it."""
    sketcher = Sketcher()
    response = post(body, sketcher)
    assert response.status_code == 200, response.text
    [(request, _)] = sketcher.drawn
    return request, response.json()


def pictures(seeds: Sequence[int]) -> np.ndarray:
    """What these seeds draw."""
    return np.stack([picture_of(seed) for seed in seeds])
