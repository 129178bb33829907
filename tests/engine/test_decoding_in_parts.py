"""A video is decoded in parts, and between them the engine serves others."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import toy_video
from max.driver import Buffer
from toy_video import ToyVideoPipeline

from max_diffusion import (
    GenerationContext,
    GenerationRequest,
    MaxDiffusionError,
    RequestCancelled,
)
from max_diffusion.denoising.loop import Denoising
from max_diffusion.engine import (
    Engine,
    Event,
    Preview,
    StepTaken,
    SubmitOptions,
)
from max_diffusion.pipelines.outputs import Denoised

SECONDS = 60


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyVideoPipeline]:
    with toy_video.registered():
        yield toy_video.load(toy_video.write_folder(tmp_path_factory.mktemp("video")))


def video(num_frames: int = 9, **values: Any) -> GenerationRequest:
    return GenerationRequest(("gray 90",), options={"num_frames": num_frames}, **values)


class Watched:
    """Counts the parts of videos of nine frames, and stops in the first of them."""

    def __init__(
        self, pipeline: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.parts = 0
        self.parts_of_others = 0
        self.is_begun, self.may_go_on = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._decode_parts = pipeline.decode_parts
        monkeypatch.setattr(pipeline, "decode_parts", self.decode_parts)

    def decode_parts(
        self, context: GenerationContext, latents: Buffer
    ) -> Iterator[np.ndarray]:
        for part in self._decode_parts(context, latents):
            if context.num_frames < 9:
                self.parts_of_others += 1
                yield part
                continue
            self.parts += 1
            if self.parts == 1:
                self.is_begun.set()
                assert self.may_go_on.wait(SECONDS)
            elif self.error is not None:
                raise self.error
            yield part


def test_who_comes_while_a_video_is_decoded_takes_its_steps(
    pipeline: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = video(seed=1)
    alone = pipeline.draw(request).frames
    watched = Watched(pipeline, monkeypatch)
    taken: list[int] = []

    def note(event: Event) -> None:  # on the engine's thread
        if isinstance(event, StepTaken):
            taken.append(watched.parts)

    with Engine(pipeline) as engine:
        handle = engine.submit(request)
        assert watched.is_begun.wait(SECONDS)
        options = SubmitOptions(emits_steps=True)
        other = engine.submit(video(1), options, listener=note)
        watched.may_go_on.set()
        assert np.array_equal(handle.result(SECONDS).frames, alone)
        assert other.result(SECONDS).frames.shape[1] == 1
    # A step after each part; encoding may have taken the first one's turn.
    assert {2, 3, 4} < set(taken)
    assert taken == sorted(taken)
    assert watched.parts == 5


def test_one_video_is_decoded_at_a_time(
    pipeline: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(pipeline, monkeypatch)
    with Engine(pipeline) as engine:
        first = engine.submit(video())
        assert watched.is_begun.wait(SECONDS)
        second = engine.submit(video(2, num_inference_steps=1))
        watched.may_go_on.set()
        second.result(SECONDS)
        assert watched.parts == 5
        assert first.result(0).frames.shape[1] == 9


def test_a_request_that_leaves_is_not_decoded_further(
    pipeline: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(pipeline, monkeypatch)
    with Engine(pipeline) as engine:
        handle = engine.submit(video())
        assert watched.is_begun.wait(SECONDS)
        handle.cancel()
        watched.may_go_on.set()
        with pytest.raises(RequestCancelled):
            handle.result(SECONDS)
        assert engine.submit(video(1)).result(SECONDS).frames.shape[1] == 1
    assert watched.parts == 1


def test_an_idle_engine_holds_nothing_of_a_video_that_was_cancelled_half_decoded(
    pipeline: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(pipeline, monkeypatch)
    held: list[weakref.ref[Denoising]] = []
    finish = pipeline.finish

    def noting(denoising: Denoising) -> Denoised:
        held.append(weakref.ref(denoising))
        return finish(denoising)

    monkeypatch.setattr(pipeline, "finish", noting)
    with Engine(pipeline) as engine:
        handle = engine.submit(video())
        assert watched.is_begun.wait(SECONDS)
        assert held[0]() is not None
        handle.cancel()
        watched.may_go_on.set()
        with pytest.raises(RequestCancelled):
            handle.result(SECONDS)
        assert held[0]() is None


def test_an_error_in_a_later_part_ends_its_own_request(
    pipeline: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(pipeline, monkeypatch)
    watched.error = RuntimeError("no more memory")
    watched.may_go_on.set()
    with Engine(pipeline) as engine:
        handle, other = engine.submit(video()), engine.submit(video(3))
        with pytest.raises(MaxDiffusionError, match="no more memory"):
            handle.result(SECONDS)
        assert other.result(SECONDS).frames.shape[1] == 3
    assert watched.parts == 2


def test_previews_of_videos_are_decoded_in_parts(
    pipeline: ToyVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(pipeline, monkeypatch)
    watched.may_go_on.set()
    with Engine(pipeline) as engine:
        handle = engine.submit(video(), SubmitOptions(num_previews=1))
        previews = [
            event for event in handle.events(SECONDS) if isinstance(event, Preview)
        ]
        result = handle.result(SECONDS)
    assert [preview.frames.shape for preview in previews] == [(1, 9, 4, 6, 3)]
    assert result.report.decode_seconds > 0
    assert watched.parts == 10
