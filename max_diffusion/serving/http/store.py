"""Images that wait to be fetched by their address."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import final


@final
class ImageStore:
    """Keeps files for a while, the newest up to so many bytes; in memory only.

    Names cannot be guessed, so an address is as good as a key.
    """

    def __init__(self, max_bytes: int, max_seconds: float) -> None:
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._files: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()
        self._bytes = 0

    def put(self, data: bytes, kind: str) -> str:
        """Keeps an image file of a format, such as ``png``, and returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._files[name] = (time.monotonic(), f"image/{kind}", data)
        self._bytes += len(data)
        self._forget()
        return name

    def get(self, name: str) -> tuple[str, bytes] | None:
        """Returns media type and contents; ``None`` if the file is no longer there."""
        self._forget()
        found = self._files.get(name)
        return None if found is None else found[1:]

    def _forget(self) -> None:
        oldest_allowed = time.monotonic() - self._max_seconds
        while self._files:
            made, _, data = next(iter(self._files.values()))
            # The newest stays, whatever its size: someone has just been told of it.
            is_too_much = self._bytes > self._max_bytes and len(self._files) > 1
            if made >= oldest_allowed and not is_too_much:
                break
            self._files.popitem(last=False)
            self._bytes -= len(data)
