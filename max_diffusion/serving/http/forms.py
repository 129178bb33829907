"""Bodies of ``multipart/form-data``: text fields and files, of limited size."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel

from .bodies import ALIASES
from .errors import ApiError

_MAX_PARTS: Final = 128
_MAX_HEADERS: Final = 8192
_NESTED: Final = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")
# Where no text is a text.
_MAY_BE_EMPTY: Final = frozenset(("prompt", "negative_prompt"))
# That leave bytes as they are.
_CODINGS: Final = ("", "7bit", "8bit", "binary")


@dataclass(frozen=True)
class File:
    """One uploaded file."""

    field: str
    """Name of its field, without the brackets of a list."""
    data: bytes


@dataclass(frozen=True)
class Form:
    """What a body holds."""

    texts: Mapping[str, str | list[str]] = field(default_factory=dict)
    """Text fields by their names; those whose names end in brackets as lists."""
    files: tuple[File, ...] = ()
    """Files in their order."""


def is_form(content_type: str) -> bool:
    """Whether a body of this type is a form with files."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def read_form(content_type: str, body: bytes) -> Form:
    """Takes a body apart; its size is limited before.

    Args:
        content_type: The header, which names what parts are separated by.
        body: All of it.

    Raises:
        ApiError: It is no such form, is cut off, or gives a field twice.
    """
    boundary = _boundary(content_type)
    delimiter = b"\r\n--" + boundary
    body = b"\r\n" + body
    if body.count(delimiter) > _MAX_PARTS:
        raise _malformed(f"expected at most {_MAX_PARTS} parts")
    _, *parts = body.split(delimiter)
    if not parts or not parts[-1].startswith(b"--"):
        raise _malformed("it has no end, or another boundary than its header says")
    texts: dict[str, str | list[str]] = {}
    files: list[File] = []
    for part in parts[:-1]:
        head, found, data = part.partition(b"\r\n\r\n")
        name, is_file = _heading(head)
        if not found:
            raise _malformed("a part has no header")
        field_name = name.removesuffix("[]")
        before = texts.get(field_name)
        if is_file:
            files.append(File(field_name, data))
        elif field_name != name and (before is None or isinstance(before, list)):
            texts[field_name] = [*(before or ()), _text(data, name)]
        elif before is not None:
            raise ApiError(
                400,
                f"{field_name[:80]}: is given twice; leave one out",
                code="invalid_value",
                param=field_name[:80],
            )
        else:
            texts[field_name] = _text(data, name)
    return Form(texts, tuple(files))


def values_of(
    texts: Mapping[str, str | list[str]], schema: type[BaseModel]
) -> dict[str, Any]:
    """Returns a form's text fields as the JSON that a schema takes.

    Numbers, true and false are read where the schema has no text; ``name[key]`` is a
    key of ``name``, and a list is one of names or objects; what is empty is not given,
    as OpenAI's client writes null.

    Raises:
        ApiError: A field is both whole and in keys.
    """
    values: dict[str, Any] = {}
    in_keys: dict[str, dict[str, Any]] = {}
    for name, text in texts.items():
        nested = _NESTED.fullmatch(name)
        if nested is not None:
            in_keys.setdefault(nested[1], {})[nested[2]] = _value(text)
        elif isinstance(text, list):
            values[name] = [_item(each) for each in text]
        elif text or name in _MAY_BE_EMPTY:
            known = schema.model_fields.get(ALIASES.get(name, name))
            is_text = known is None or _takes_text(known.annotation)
            values[name] = text if is_text else _value(text)
    for name in in_keys:
        if name in values:
            raise _malformed(f"{name[:80]} is given whole, and in keys")
    return values | in_keys


def _boundary(content_type: str) -> bytes:
    header = Message()
    header["Content-Type"] = content_type
    found = header.get_boundary()
    if found is None or not 0 < len(found) <= 70 or not found.isascii():
        raise _malformed("its header has no boundary of 1 to 70 characters")
    return found.encode()


def _heading(head: bytes) -> tuple[str, bool]:
    """Name of a part's field, and whether it is a file."""
    if len(head) > _MAX_HEADERS:
        raise _malformed(f"expected headers of at most {_MAX_HEADERS} bytes a part")
    try:
        header = HeaderParser().parsestr(head.decode("utf-8").strip() + "\n\n")
    except UnicodeDecodeError as err:
        raise _malformed("a part's header is no UTF-8") from err
    coding = header.get("Content-Transfer-Encoding", "").strip()
    if coding.lower() not in _CODINGS:
        raise _malformed(f"a part is in {coding[:80]!r}; send its bytes as they are")
    name = header.get_param("name", header="content-disposition")
    if not isinstance(name, str) or not name:
        raise _malformed("a part has no name")
    if name == "[]":
        raise _malformed(
            "a part is named [], a list of no field; name the field before"
        )
    return name, header.get_filename() is not None


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise ApiError(
            400,
            f"{name[:80]}: expected text in UTF-8; a file has a filename in its header",
            code="invalid_encoding",
            param=name[:80],
        ) from err


def _value(text: str | list[str]) -> Any:
    if isinstance(text, list):
        return [_value(each) for each in text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # which the schema refuses with its name


def _item(text: str) -> Any:
    """An object of a list, or else a name, which may look like a number."""
    return _value(text) if text.lstrip().startswith("{") else text


def _takes_text(annotation: Any) -> bool:
    """Whether text is among the values of a field."""
    if annotation is str:
        return True
    if get_origin(annotation) is Literal:
        return any(isinstance(value, str) for value in get_args(annotation))
    is_mapping = get_origin(annotation) is dict
    return not is_mapping and any(map(_takes_text, get_args(annotation)))


def _malformed(what: str) -> ApiError:
    return ApiError(
        400, f"body: expected multipart/form-data, but {what}", code="invalid_form"
    )
