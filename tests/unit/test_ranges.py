"""Parts of a file, by the header ``Range``."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from max_diffusion.serving.http.ranges import ranged

DATA = bytes(range(200)) + b"the end"
SIZE = len(DATA)


def ask(**headers: str) -> httpx.Response:
    app = FastAPI()

    @app.get("/file")
    async def file(request: Request) -> Response:
        return ranged(DATA, "video/mp4", request.headers)

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as to:
            return await to.get("/file", headers=headers)

    return asyncio.run(get())


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-1", 0, 2),  # what Safari asks for first
        ("bytes=0-", 0, SIZE),
        ("bytes=200-", 200, SIZE),
        ("bytes=5-5", 5, 6),
        ("bytes=100-99999", 100, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        ("bytes=-99999", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
    ],
)
def test_a_part_is_answered_with_its_place(asked: str, start: int, stop: int) -> None:
    answer = ask(range=asked)
    assert answer.status_code == 206
    assert answer.content == DATA[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)
    assert answer.headers["content-type"] == "video/mp4"


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=9999-10000", "bytes=-0"])
def test_a_part_behind_the_end_is_refused(asked: str) -> None:
    answer = ask(range=asked)
    assert answer.status_code == 416
    assert answer.content == b""
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"range": "bytes=-"},
        {"range": "bytes=9-3"},
        {"range": "bytes=0-1,5-6"},
        {"range": "frames=0-1"},
        {"range": "nonsense"},
        {"range": f"bytes={'9' * 5000}-"},  # more digits than Python reads
        {"range": "bytes=0-1", "if-range": '"some"'},
    ],
)
def test_all_else_is_answered_with_the_whole(headers: dict[str, str]) -> None:
    answer = ask(**headers)
    assert answer.status_code == 200
    assert answer.content == DATA
    assert answer.headers["accept-ranges"] == "bytes"
    assert "content-range" not in answer.headers
