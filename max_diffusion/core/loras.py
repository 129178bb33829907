"""Which LoRAs a caller wants, each with its weight."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from ..errors import RequestError
from .validation import finite, text

Loras: TypeAlias = tuple[tuple[str, float], ...]
"""Names or files, each with its weight: 1 is as it was trained."""
GivenLoras: TypeAlias = (
    str
    | os.PathLike[str]
    | Mapping[str, float]
    | Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]]
)
"""One, several, or several with weights: what :func:`as_loras` takes."""

MAX_WEIGHT: Final = 100.0
ADAPTER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a LoRA may be called that requests choose."""


def as_loras(where: str, given: GivenLoras | None) -> Loras:
    """Returns what a caller gave in any form.

    Args:
        where: For messages, such as ``request: loras``.
        given: ``None`` for none.

    Raises:
        RequestError: A name is no text or given twice, or a weight no number of -100
            to 100.
    """
    if given is None:
        return ()
    if isinstance(given, str | os.PathLike):
        given = [given]
    items: Iterable[Any] = given.items() if isinstance(given, Mapping) else given
    if isinstance(given, bytes) or not isinstance(given, Mapping | Sequence):
        raise RequestError(
            f"{where}: expected names, or weights by name, got {given!r:.80}"
        )
    found: dict[str, float] = {}
    for item in items:
        pair = item if isinstance(item, tuple | list) else (item, 1.0)
        if len(pair) != 2:
            raise RequestError(
                f"{where}: expected a name, or a name and its weight, got {item!r:.80}"
            )
        name = text(where, os.fspath(pair[0]) if _is_path(pair[0]) else pair[0])
        if not name:
            raise RequestError(f"{where}: a name is empty; leave it out")
        if name in found:
            raise RequestError(
                f"{where}: {name!r:.200} is given twice; give it once, with one weight"
            )
        found[name] = lora_weight(f"{where}: the weight of {name!r:.200}", pair[1])
    return tuple(found.items())


def as_lora_files(where: str, given: GivenLoras | None) -> Loras:
    """Returns files that a caller gave in any form, each once, however it is spelled.

    Args:
        where: For messages.
        given: ``None`` for none.

    Raises:
        RequestError: As of :func:`as_loras`, or two paths lead to one file.
    """
    files = as_loras(where, given)
    seen: dict[tuple[int, int], str] = {}
    for file, _ in files:
        try:
            found = os.stat(file)
        except (OSError, ValueError):
            continue  # told where it is opened
        first = seen.setdefault((found.st_dev, found.st_ino), file)
        if first != file:
            raise RequestError(
                f"{where}: {first!r:.200} and {file!r:.200} are one file; give it "
                "once, with one weight"
            )
    return files


def lora_weight(where: str, value: float) -> float:
    """Returns a weight as a float of -100 to 100, else raises RequestError."""
    number = finite(where, value)
    if abs(number) > MAX_WEIGHT:
        raise RequestError(
            f"{where} must be -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, got {number:g}; most "
            "are used at 0.5 to 1"
        )
    return number


def lora_from_text(option: str, given: str) -> tuple[str, float]:
    """Returns the file and the weight of ``FILE`` or ``FILE:WEIGHT``.

    Args:
        option: For messages.
        given: Its value; a file of the whole name is that file.

    Raises:
        RequestError: What follows the last colon is no number of -100 to 100.
    """
    file, colon, weight = given.rpartition(":")
    # Not of Path, which raises where a name is too long.
    if not colon or os.path.exists(given):
        return given, 1.0
    try:
        number = float(weight)
    except ValueError as err:
        if not os.path.exists(file):
            return given, 1.0  # which is not there, and is said to be so
        raise RequestError(
            f"{option}: expected FILE or FILE:WEIGHT with a number, such as "
            f"{file:.200}:0.8, got {weight!r:.80}"
        ) from err
    return file, lora_weight(f"{option}: the weight of {file:.200}", number)


def files_by_name(where: str, given: Sequence[str]) -> dict[str, str]:
    """Returns the files by name of ``NAME=FILE`` each.

    Args:
        where: For messages.
        given: The texts.

    Raises:
        RequestError: A text is none such, or a name comes twice.
    """
    found: dict[str, str] = {}
    for item in given:
        name, equals, file = item.partition("=")
        if not (name and equals and file):
            raise RequestError(
                f"{where}: expected NAME=FILE such as style=style.safetensors, got "
                f"{item!r:.200}"
            )
        if name in found:
            raise RequestError(
                f"{where}: {name!r:.80} names two files, {found[name]} and {file}; "
                "choose another name for one"
            )
        found[name] = file
    return found


def _is_path(value: object) -> bool:
    return isinstance(value, os.PathLike)
