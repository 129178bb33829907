"""Requests on their way: streams of events, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import final

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...engine import Event, Failed, Finished
from ...errors import MaxDiffusionError
from ...pipelines.outputs import GenerationResult
from .answers import Answers
from .backend import Events
from .errors import ApiError, api_error

Draw = Callable[[], Awaitable[Events]]
"""Function that puts a request in the queue, and returns its events."""
_COMMENT = ": keep-alive\n\n"


@final
class EventStream(StreamingResponse):
    """Sends server-sent events that are never silent for long.

    Args:
        events: Events of the request; closed when the answer is over, however that
            comes about: a client may leave before the first byte.
        answers: Creates what is sent.
        keep_alive_seconds: Silence after which there is a comment, which clients skip
            and proxies take for life.
    """

    def __init__(
        self, events: Events, answers: Answers, keep_alive_seconds: float
    ) -> None:
        self._events = events
        super().__init__(
            kept_alive(_frames(events, answers), keep_alive_seconds),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream; ends early if the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def begun(draw: Draw, seconds: float) -> Events:
    """Waits a limited time for a request to be taken, and returns its events.

    So a refusal that comes at once has a status of its own, and a client that has to
    wait for a place is told that it does.

    Raises:
        ApiError: The request cannot be drawn now.
        MaxDiffusionError: The request was refused.
    """
    events = _LateEvents(draw)
    try:
        await events.wait(seconds)
    except BaseException:
        await events.aclose()
        raise
    return events


@final
class _LateEvents(Events):
    """The events of a request that may still wait to be taken."""

    def __init__(self, draw: Draw) -> None:
        self._drawing: asyncio.Future[Events] = asyncio.ensure_future(draw())

    async def wait(self, seconds: float) -> None:
        """Waits for the request to be taken, ``seconds`` at most.

        Raises:
            Exception: The request was refused.
        """
        await asyncio.wait({self._drawing}, timeout=seconds)
        if self._drawing.done():
            self._drawing.result()

    async def __anext__(self) -> Event:
        """Waits for the next event; raises why the request was not taken."""
        return await anext(await asyncio.shield(self._drawing))

    async def aclose(self) -> None:
        """Cancels the request, or the wait for a place."""
        self._drawing.cancel()
        await asyncio.wait({self._drawing})
        if not self._drawing.cancelled() and self._drawing.exception() is None:
            await self._drawing.result().aclose()


async def result_unless_gone(request: Request, draw: Draw) -> GenerationResult | None:
    """Waits for the images; returns ``None``, and cancels, if the client leaves.

    Raises:
        ApiError: The request cannot be drawn now.
        MaxDiffusionError: The request was refused or failed, so there are no images.
    """

    async def last(draw: Draw) -> Event:
        async with aclosing(await draw()) as events:
            del draw  # with the pictures that it brought
            async for event in events:
                if isinstance(event, Finished | Failed):
                    return event
        raise AssertionError("the last event is Finished or Failed")

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(last(draw)), asyncio.ensure_future(gone())
    del draw
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return None
        event = tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Finished)
    return event.result


async def kept_alive(
    texts: AsyncGenerator[str, None], seconds: float
) -> AsyncIterator[str]:
    """Yields the texts, and a comment wherever none came for ``seconds``."""

    async def following() -> str | None:
        return await anext(texts, None)

    async with aclosing(texts):
        while True:
            pending = asyncio.ensure_future(following())
            try:
                while not (await asyncio.wait({pending}, timeout=seconds))[0]:
                    yield _COMMENT
                text = pending.result()
            finally:
                pending.cancel()
                await asyncio.wait({pending})  # a generator that runs cannot be closed
            if text is None:
                return
            yield text


async def _frames(events: Events, answers: Answers) -> AsyncGenerator[str, None]:
    """Yields server-sent events; an error on the way is the last of them."""
    try:
        async for event in events:
            # Encoding an image takes milliseconds, which other streams need not wait.
            for data in await asyncio.to_thread(answers.events, event):
                yield f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"
    except (ApiError, MaxDiffusionError) as err:  # refused after a wait
        data = {"type": "error", **api_error(err).body}
        yield f"event: error\ndata: {json.dumps(data)}\n\n"
