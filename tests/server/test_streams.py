"""Streams that are never silent, and clients that leave at any moment."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from painters import Painter, report_of
from serving import listening
from sketcher import STEPS, Sketcher, post

from max_diffusion.caches import NoCacheConfig
from max_diffusion.core.request import GenerationRequest
from max_diffusion.engine import Event, Finished, QueueFullError, Started, SubmitOptions
from max_diffusion.errors import MaxDiffusionError, RequestError
from max_diffusion.serving.http import LocalBackend, ServerSettings, create_app
from max_diffusion.serving.http.backend import ModelDescription
from max_diffusion.serving.http.errors import ApiError
from max_diffusion.serving.http.streams import kept_alive

BODY = {"prompt": "a red circle", "seed": 1}
STREAM = BODY | {"stream": True, "progress": True}
ALIVE = ": keep-alive"
SOON = 0.05


def blocks(text: str) -> list[str]:
    """A comment as it is, an event by its name."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        assert lines == [ALIVE] or len(lines) == 2
        found.append(lines[0].removeprefix("event: image_generation."))
    return found


def test_a_stream_says_that_it_is_alive_wherever_nothing_comes() -> None:
    response = post(STREAM, Sketcher(pause=0.5), settings={"keep_alive_seconds": 0.1})
    found = blocks(response.text)
    events = [name for name in found if name != ALIVE]
    assert events == [*["progress"] * STEPS, "completed"]
    pauses = "".join("." if name == ALIVE else "|" for name in found).split("|")
    assert pauses.pop() == ""
    assert all(1 <= len(pause) <= 5 for pause in pauses), pauses


def test_a_stream_that_has_much_to_tell_says_nothing_else() -> None:
    response = post(STREAM, Sketcher(), settings={"keep_alive_seconds": 5})
    assert blocks(response.text) == [*["progress"] * STEPS, "completed"]


def test_a_stream_is_told_while_it_waits_for_a_place() -> None:
    sketcher = Sketcher(queue_pause=3)
    with listening(sketcher, keep_alive_seconds=SOON) as url:
        started = time.monotonic()
        address = f"{url}/v1/images/generations"
        with httpx.stream("POST", address, json=STREAM, timeout=10) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert next(lines) == ALIVE
            assert time.monotonic() - started < 2.5
            assert sketcher.drawn == []
            rest = [line for line in lines if line and line != ALIVE]
    assert rest[-2] == "event: image_generation.completed"


def test_longest_silence_is_below_15_seconds() -> None:
    # Once before the answer begins, and then between its parts.
    assert 0 < ServerSettings().keep_alive_seconds <= 10


def test_openais_client_does_not_mind_comments() -> None:
    with listening(Sketcher(pause=0.2), keep_alive_seconds=SOON) as url:
        settings: Any = {"base_url": f"{url}/v1", "api_key": "none"}
        with openai.OpenAI(**settings, max_retries=0) as client:
            events = list(client.images.generate(prompt="a star", stream=True))
    assert [event.type for event in events] == ["image_generation.completed"]


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (RequestError("size: no; another"), 400, "invalid_value"),
        (QueueFullError("engine: full; later"), 429, "queue_full"),
        (ApiError(503, "server: loading; later", code="loading"), 503, "loading"),
    ],
    ids=["bad", "full", "loading"],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_refusal_has_a_status_or_after_a_wait_is_an_event(
    refusal: Exception, status: int, code: str, is_stream: bool
) -> None:
    body = BODY | {"stream": is_stream}
    at_once = post(body, Sketcher(refusal=refusal))
    assert at_once.status_code == status
    assert at_once.json()["error"]["code"] == code
    settings = {"keep_alive_seconds": SOON}
    late = post(body, Sketcher(queue_pause=0.3, refusal=refusal), settings=settings)
    if not is_stream:
        assert late.status_code == status
        return
    assert late.status_code == 200
    assert late.text.startswith(ALIVE)
    name, data = late.text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    event = json.loads(data.removeprefix("data: "))
    assert event == {"type": "error", "error": at_once.json()["error"]}


def test_a_failure_is_the_last_event() -> None:
    response = post(STREAM, Sketcher(failure=MaxDiffusionError("step: no; again")))
    assert blocks(response.text)[-1] == "event: error"
    assert post(BODY, Sketcher(failure=MaxDiffusionError("x"))).status_code == 500


# Clients that leave.


async def call(app: Any, body: dict[str, Any], leaves_after: float) -> list[Any]:
    """Asks, and is gone after a while; what was sent until then."""
    sent: list[Any] = []
    content = json.dumps(body).encode()
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.sleep(leaves_after)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/images/generations",
        "raw_path": b"/v1/images/generations",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"x")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("leaves_after", [0.0, 0.001, 0.15])
def test_a_client_that_leaves_ends_its_request(
    is_stream: bool, leaves_after: float
) -> None:
    sketcher = Sketcher(pause=0.2)
    app = create_app(sketcher, ServerSettings())
    asyncio.run(call(app, BODY | {"stream": is_stream}, leaves_after))
    # Nobody was there before it was taken, or it is closed.
    assert all(sketch.is_closed for sketch in sketcher.sketches)
    assert len(sketcher.sketches) + sketcher.num_abandoned <= 1
    if is_stream or leaves_after:
        assert len(sketcher.sketches) == 1
        assert sketcher.sketches[0].left  # it was not drawn to its end


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_the_queue_leaves_nothing_behind(is_stream: bool) -> None:
    sketcher = Sketcher(queue_pause=5)
    app = create_app(sketcher, ServerSettings(keep_alive_seconds=0.02))
    started = time.monotonic()
    asyncio.run(call(app, BODY | {"stream": is_stream}, 0.1))
    assert time.monotonic() - started < 2
    assert sketcher.num_abandoned == 1
    assert sketcher.sketches == []


def test_a_stream_that_was_never_sent_closes_its_request() -> None:
    """As when the client is gone before the first byte can be."""
    sketcher = Sketcher()
    app = create_app(sketcher, ServerSettings())

    async def run() -> None:
        sent = 0

        async def refuse(message: Any) -> None:
            nonlocal sent
            sent += 1
            raise OSError("the connection is gone")

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            await app(scope, receive, refuse)

        with pytest.raises(BaseException):  # noqa: B017  # the server's to log
            await call(inner, STREAM, 5)
        assert sent == 1

    asyncio.run(run())
    assert [sketch.is_closed for sketch in sketcher.sketches] == [True]
    assert len(sketcher.sketches[0].left) == STEPS + 1


# The engine's events.


class Counting:
    """What LocalBackend needs of an engine; submitting takes as long as it is told."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate = gate
        self.cancelled = 0
        self.listener: Callable[[Event], None] = lambda event: None
        self.is_alive = True

    def submit(self, request: Any, options: Any, *, listener: Any) -> Any:
        if self.gate is not None:
            self.gate.wait(10)
        self.listener = listener

        def cancel() -> None:
            self.cancelled += 1

        return SimpleNamespace(cancel=cancel)


def opened(engine: Counting, monkeypatch: pytest.MonkeyPatch) -> LocalBackend:
    backend = LocalBackend()
    description = ModelDescription((16, 16), 1, {}, {}, "none", {}, ())
    monkeypatch.setattr(ModelDescription, "of", lambda pipeline: description)
    pipeline = Painter()
    pipeline.seconds = {"load": 0.0, "compile": 0.0}  # type: ignore[attr-defined]
    engine.pipeline = pipeline  # type: ignore[attr-defined]
    engine.stats = lambda: None  # type: ignore[attr-defined]
    backend.open(engine)  # type: ignore[arg-type]
    return backend


REQUEST = GenerationRequest(prompts=("x",), cache=NoCacheConfig())


def test_events_that_nobody_reads_are_closed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Counting()
    backend = opened(engine, monkeypatch)

    async def run() -> None:
        events = await backend.draw(REQUEST, SubmitOptions())
        await events.aclose()
        assert engine.cancelled == 1
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    asyncio.run(run())


def test_events_end_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Counting()
    backend = opened(engine, monkeypatch)

    async def run() -> list[Event]:
        events = await backend.draw(REQUEST, SubmitOptions())
        for event in (Started(), last, Started()):
            engine.listener(event)
        return [event async for event in events]

    last = Finished(SimpleNamespace(report=report_of(REQUEST, 1, 0.1)))  # type: ignore[arg-type]
    assert asyncio.run(run()) == [Started(), last]


def test_who_leaves_while_it_is_submitted_cancels_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    engine = Counting(gate)
    backend = opened(engine, monkeypatch)

    async def run() -> None:
        drawing = asyncio.ensure_future(backend.draw(REQUEST, SubmitOptions()))
        await asyncio.sleep(0.05)
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        assert engine.cancelled == 0  # the thread is still at it
        gate.set()
        for _ in range(100):
            if engine.cancelled:
                break
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert engine.cancelled == 1


def test_comments_do_not_outlive_their_stream() -> None:
    closed = []

    async def texts() -> AsyncGenerator[str, None]:
        try:
            yield "one"
            await asyncio.sleep(60)
            yield "two"
        finally:
            closed.append(True)

    async def run() -> list[str]:
        stream = kept_alive(texts(), 0.01)
        found = [await anext(stream), await anext(stream), await anext(stream)]
        await stream.aclose()  # type: ignore[attr-defined]
        return found

    assert asyncio.run(run()) == ["one", ALIVE + "\n\n", ALIVE + "\n\n"]
    assert closed == [True]
