"""What is checked before a request is read: its key and its size."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from typing import Final, final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

_BODY_SECONDS: Final = 30.0


@final
class Guard:
    """ASGI middleware: bearer keys for ``/v1``, and a limit for every body."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers itself, or passes on with the body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            if str(scope["path"]).startswith("/v1/"):
                self._check_key(headers.get(b"authorization", b""))
            body = await self._body(headers, receive)
        except ApiError as err:
            await err.response(scope, receive, send)
            return
        if body is None:
            return
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()  # waits for the client to go away
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_key(self, header: bytes) -> None:
        if not self._keys:
            return
        scheme, _, given = header.partition(b" ")
        # Compares with all of them, so that the time tells nothing.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            what = "this API key is not known" if header else "no API key was given"
            raise ApiError(
                401,
                f"server: {what}; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive
    ) -> bytes | None:
        """The whole body; ``None`` if the client has left."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._limit:
            raise self._too_large()
        chunks, size = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > self._limit:
                        raise self._too_large()
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408, f"body: not complete after {_BODY_SECONDS:g} s; send it again"
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"body: expected at most {self._limit} bytes; shorten the prompt",
            code="body_too_large",
            headers={"Connection": "close"},
        )
