"""Parts of a file by Range, which browsers ask for to play videos (RFC 9110)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fastapi import Response

# No file has as many bytes as more digits say.
_ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def ranged(data: bytes, media_type: str, headers: Mapping[str, str]) -> Response:
    """Answers with a file, or the part of it that a request asks for.

    Args:
        data: The whole file.
        media_type: Of the file.
        headers: The request's. Several ranges at once, other units and what makes no
            sense are answered with the whole file, as the standard has it; so is
            ``If-Range``, since the answers bear nothing that it could name.

    Returns:
        200 with all, 206 with a part, or 416 where the part begins behind the end.
    """
    accepts = {"accept-ranges": "bytes"}
    match = _ONE_RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if match is None or match[0] == "bytes=-" or "if-range" in headers:
        return Response(data, media_type=media_type, headers=accepts)
    first, last = match.groups()
    size = len(data)
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:  # makes no sense
            return Response(data, media_type=media_type, headers=accepts)
    else:
        start, stop = max(size - int(last), 0), size
    if start >= stop:
        accepts["content-range"] = f"bytes */{size}"
        return Response(status_code=416, headers=accepts)
    accepts["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(data[start:stop], 206, media_type=media_type, headers=accepts)
