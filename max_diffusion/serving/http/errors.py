"""Errors in the form that OpenAI's clients know."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ...caches import CACHES
from ...engine import DeadlineError, EngineStoppedError, QueueFullError
from ...errors import (
    CacheNotLoadedError,
    MaxDiffusionError,
    RequestCancelled,
    RequestError,
)
from .bodies import (
    ALIASES,
    FIXES,
    DrawingRequest,
    TwoNamesError,
    field_names,
    shown,
)

_OF_FIELD: Final = re.compile(r"request: ([a-z][a-z0-9_]*) (?:must|is no option)")
_ENDS: Final = ("/images/generations", "/images/edits", "/videos", "/models")
_UNREADABLE: Final = (
    "body: expected JSON that can be read; nest less, write shorter numbers"
)
_Body = TypeVar("_Body", bound=DrawingRequest)


class ApiError(Exception):
    """An error that is answered over HTTP."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param = code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> Response:
        """The HTTP response that tells the error."""
        # In ASCII: a body may hold halves of characters, which no UTF-8 can tell of.
        text = json.dumps(self.body)
        return Response(text, self.status, self.headers, "application/json")


def api_error(error: Exception) -> ApiError:
    """Returns the answer to an error of the engine."""
    message = str(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        wait = str(math.ceil(error.retry_after))
        return ApiError(429, message, code="queue_full", headers={"Retry-After": wait})
    if isinstance(error, DeadlineError):
        return ApiError(504, message, code="deadline_exceeded")
    if isinstance(error, EngineStoppedError | RequestCancelled):
        return ApiError(
            503, message, code="shutting_down", headers={"Retry-After": "5"}
        )
    if isinstance(error, CacheNotLoadedError):
        fix = "ask for one that GET /v1/models lists, or start the server with"
        message = f"{error.problem}; {fix} {error.cache} in its --caches"
        return ApiError(400, message, code="invalid_value", param="cache")
    if isinstance(error, RequestError):
        return ApiError(400, message, code="invalid_value", param=_field(message))
    if isinstance(error, MaxDiffusionError):
        return ApiError(500, message, code="engine_error")
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def _field(message: str) -> str | None:
    """Returns the body's field that an error of a request or its cache is about."""
    if message.partition(":")[0] in ("cache", *CACHES):
        return "cache"
    if (given := message.partition(" ")[0].rstrip(":")) in ("image", "mask"):
        return given
    found = _OF_FIELD.match(message)
    return ALIASES.get(found[1], found[1]) if found else None


def read_json(content_type: str, body: bytes) -> dict[str, Any]:
    """Returns the object that a body holds, as JSON.

    Raises:
        ApiError: It is none, or its type is not said.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _no_json_type("application/json or multipart/form-data")
    try:
        values = json.loads(body)
    except json.JSONDecodeError as err:
        raise ApiError(
            400, f"body: expected JSON ({err.msg})", code="invalid_json"
        ) from err
    except (ValueError, RecursionError) as err:
        raise ApiError(400, _UNREADABLE, code="invalid_json") from err
    if not isinstance(values, dict):
        raise ApiError(
            422,
            f"body: expected a JSON object, got {shown(values)}",
            code="dict_type",
            param="body",
        )
    return values


def checked(values: Mapping[str, Any], schema: type[_Body]) -> _Body:
    """Returns a body that was read here and not by FastAPI.

    Raises:
        ApiError: It does not fit the schema.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as err:
        errors = [{**each, "loc": ("body", *each["loc"])} for each in err.errors()]
        raise not_valid(errors, schema) from err


def not_valid(
    errors: Sequence[Mapping[str, Any]], schema: type[DrawingRequest]
) -> ApiError:
    """Returns the answer to a body that does not fit the schema: its first error.

    Args:
        errors: All errors of the body.
        schema: What it should be.
    """
    first = errors[0]
    place: Sequence[object] = first["loc"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"body: expected JSON ({reason})", code="invalid_json")
    where = ".".join(str(part) for part in place[1:]) or "body"
    if isinstance(first["input"], bytes):
        return _no_json_type("application/json")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, TwoNamesError):
        return ApiError(422, str(cause), code="invalid_value", param=cause.param)
    message = f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    field = schema.model_fields.get(where)
    is_pattern = first["type"] == "string_pattern_mismatch" and where not in FIXES
    if is_pattern and field is not None and field.description:
        # In words: few read patterns.
        message = f"{where}: expected {field.description.rstrip('.')}"
    if first["type"] == "extra_forbidden":
        message = (
            f"{where}: no such field; {_instead(where, schema)}GET /docs lists them"
        )
    elif first["type"] != "missing" and len(repr(first["input"])) <= 80:
        message += f", got {shown(first['input'])}"
    if where in FIXES and first["type"] != "extra_forbidden":
        message += f"; {FIXES[where]}"
    return ApiError(422, message, code=str(first["type"]), param=where)


def _no_json_type(kinds: str) -> ApiError:
    return ApiError(
        422,
        f"body: expected JSON; send the header Content-Type: {kinds}",
        code="content_type",
        param="body",
    )


def _instead(unknown: str, schema: type[DrawingRequest]) -> str:
    """Returns words for what may have been meant by an unknown field."""
    if unknown in schema.others:
        return f"{schema.others[unknown]}; "
    near = difflib.get_close_matches(unknown, field_names(schema), n=1)
    return f"did you mean {near[0]}? " if near else ""


async def on_api_error(request: Request, error: Exception) -> Response:
    """Answers :class:`ApiError` and errors of the engine."""
    return api_error(error).response


async def on_not_valid(request: Request, error: Exception) -> Response:
    """Answers bodies that do not fit the schema."""
    assert isinstance(error, RequestValidationError)
    return not_valid(error.errors(), request.app.state.body).response


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answers requests for unknown paths and methods."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # nested too deep, or a number of too many digits
        return ApiError(400, _UNREADABLE, code="invalid_json").response
    headers = dict(error.headers or {})
    if "GET" in headers.get("Allow", ""):
        headers["Allow"] += ", HEAD"
    path = f"{request.method} {request.url.path}"
    # A base URL without /v1, or with two: the slip of every client's first request.
    meant = next((f"/v1{end}" for end in _ENDS if request.url.path.endswith(end)), "")
    hint = f"did you mean {meant}? " if meant not in ("", request.url.path) else ""
    fix = f"{hint}GET /docs lists what there is"
    message = f"{path}: {str(error.detail).lower()}; {fix}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=headers).response
