"""Checks and headers that every request passes, whatever it asks for."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Collection, Sequence
from typing import Final, final

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, api_error
from .forms import is_form

logger = logging.getLogger(__name__)

REQUEST_ID: Final = "X-Request-Id"
"""Name of the header with a request's id: in every answer, and in requests that bring
an id of their own."""
_ID: Final = re.compile(rb"[!-~]{1,128}")
_BODY_SECONDS: Final = 30.0
_GZIP: Final = b"\x1f\x8b"
_FORM: Final = "multipart/form-data"
# Methods that change nothing: what they answer, a browser keeps from other pages.
_READING: Final = ("GET", "HEAD", "OPTIONS")


@final
class RequestIds:
    """ASGI middleware: every answer has an id, the client's own where it sent one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and adds the id to the answer's headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID.lower().encode(), b"")
        own = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = own
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.error("request %s has failed", own)  # why, the server logs
            raise


@final
class HeadAsGet:
    """ASGI middleware: HEAD wherever there is GET, which it answers without a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes HEAD on as GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


@final
class Guard:
    """ASGI middleware: bearer keys for ``/v1``; bodies that are small and plain.

    Forms are read on the paths that take them, and those with pictures may be larger.
    Where no key is asked for, pages of other origins may not have anything done: a
    browser sends their forms and texts without asking first, to any server that it
    reaches.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        max_body_bytes: int,
        max_upload_bytes: int,
        upload_paths: Collection[str],
        form_paths: Collection[str],
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._limit, self._upload_limit = max_body_bytes, max_upload_bytes
        self._upload_paths = frozenset(upload_paths)
        self._form_paths = self._upload_paths.union(form_paths)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request that is refused, or passes it on with its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            if self._keys and str(scope["path"]).startswith("/v1/"):
                key = self._checked_key(headers.get(b"authorization", b""))
                scope.setdefault("state", {})["owner"] = hashlib.sha256(key).digest()
            elif scope["method"] not in _READING:
                self._check_origin(headers)
            kind = headers.get(b"content-type", b"").decode("latin-1")
            has_form = scope["path"] in self._form_paths and is_form(kind)
            takes_pictures = has_form and scope["path"] in self._upload_paths
            limit, fix = self._limit, "shorten the prompt"
            if takes_pictures:
                limit = self._upload_limit
                fix = "scale the picture down, or send it as JPEG"
            elif has_form:
                fix += ", and leave out files, which are not taken here"
            body = await _read(headers, receive, limit, fix)
            if body:
                _check_uncompressed(headers, body, _FORM if has_form else "JSON")
            if body and not has_form:
                self._check_parts(scope["path"], kind)
                body = _plain(body)
        except ApiError as err:
            await err.response(scope, receive, send)
            return
        if body is None:
            return
        has_begun = False

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()  # waits for the client to go away
            read, body = body, None  # whoever reads it may let go of it
            return {"type": "http.request", "body": read, "more_body": False}

        async def note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, replay, note)
        except Exception as err:
            if not has_begun:
                await api_error(err).response(scope, receive, send)
            raise  # the server logs it

    def _check_parts(self, path: str, kind: str) -> None:
        """Refuses a body of parts that is no form, before it is read as text."""
        if is_form(kind) or not kind.strip().lower().startswith("multipart/"):
            return
        taken = _FORM if path in self._upload_paths else "application/json"
        if path in self._form_paths - self._upload_paths:
            taken += f" or {_FORM}"
        raise ApiError(
            415,
            f"body: expected {taken}, got {kind.partition(';')[0].strip()[:80]}; send "
            "it as such, with this Content-Type",
            code="content_type",
            param="body",
        )

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """Refuses what a browser sends for a page that is not allowed to ask.

        Clients that are no browser send no ``Origin``. A proxy may change ``Host``, but
        leaves ``Sec-Fetch-Site``, which no page can set.
        """
        origin = headers.get(b"origin", b"").decode("latin-1")
        is_own = origin.partition("://")[2].encode("latin-1") == headers.get(b"host")
        is_own = is_own or headers.get(b"sec-fetch-site") == b"same-origin"
        if origin and not is_own and not {origin, "*"} & self._origins:
            shown = origin if len(origin) <= 80 else origin[:79] + "…"
            raise ApiError(
                403,
                f"server: expected a page of its own or of an allowed origin, got "
                f"{shown!r}; start the server with --cors-origin {shown} to allow it",
                code="origin_not_allowed",
                headers={"Connection": "close"},
            )

    def _checked_key(self, header: bytes) -> bytes:
        """Returns the key of a request, which is one of those that are known."""
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
        return given.strip()


def owner_of(request: Request) -> bytes:
    """Returns whose request it is: a digest of its key, empty where none is needed."""
    found: bytes = getattr(request.state, "owner", b"")
    return found


async def _read(
    headers: dict[bytes, bytes], receive: Receive, limit: int, fix: str
) -> bytes | None:
    """Reads a whole body; returns ``None`` if the client has left.

    Args:
        headers: Of the request.
        receive: Of ASGI.
        limit: Most bytes.
        fix: What to do about more, for the message.

    Raises:
        ApiError: It is larger, or does not arrive.
    """
    too_large = ApiError(
        413,
        f"body: expected at most {limit} bytes; {fix}",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:20]) > limit:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(
            408, f"body: not complete after {_BODY_SECONDS:g} s; send it again"
        ) from None


def _check_uncompressed(headers: dict[bytes, bytes], body: bytes, kind: str) -> None:
    """Raises :class:`ApiError` if the body of this kind is compressed."""
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if coding.strip().lower() not in ("", "identity"):
        raise ApiError(
            415,
            f"body: expected plain {kind}, got Content-Encoding: {coding[:80]}; send "
            "it uncompressed",
            code="unsupported_encoding",
            headers={"Accept-Encoding": "identity"},
        )
    if body.startswith(_GZIP):
        raise ApiError(
            415,
            f"body: expected plain {kind}, got gzip; send it uncompressed",
            code="unsupported_encoding",
            headers={"Accept-Encoding": "identity"},
        )


def _plain(body: bytes) -> bytes:
    """Returns the body without a byte order mark.

    Raises:
        ApiError: The body is no UTF-8.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as err:
        raise _no_utf_8(f"byte 0x{body[err.start]:02x} at {err.start}") from err
    if b"\0" in body:  # not in any JSON, where it is written \u0000
        raise _no_utf_8("a zero byte, as in UTF-16")
    return body.removeprefix(codecs.BOM_UTF8)


def _no_utf_8(got: str) -> ApiError:
    return ApiError(
        400,
        f"body: expected JSON in UTF-8, got {got}; encode it as UTF-8",
        code="invalid_encoding",
    )
