"""A word before the kernel ends a compile that takes more memory than there may be."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ..core.host_memory import group_memory_limit
from ..errors import CompileError

_STATUS: Final = Path("/proc/self/status")
# A compile takes up to 0.4 GiB a second.
_SHARE: Final = 0.92
_SECONDS: Final = 0.05


@contextmanager
def memory_watched() -> Iterator[None]:
    """Ends the process with one line and a CompileError's exit code, if need be.

    That is at 92 % of the memory that its control group may have, as containers have
    it; at all of it the kernel would kill the process without a word. MAX cannot be
    stopped while it compiles. Without a control group's limit nothing is watched.
    """
    limit = group_memory_limit()
    if limit is None or not _STATUS.exists():
        yield
        return
    is_done = threading.Event()
    watch = threading.Thread(target=_watch, args=(limit, is_done), daemon=True)
    watch.start()
    try:
        yield
    finally:
        is_done.set()
        watch.join()


def _watch(limit: int, is_done: threading.Event) -> None:
    started = time.monotonic()
    while not is_done.wait(_SECONDS):
        taken = _own_bytes()
        if taken < _SHARE * limit:
            continue
        line = (
            f"error: compile: after {time.monotonic() - started:.0f} s it has taken "
            f"{taken >> 20} MiB of the {limit >> 20} MiB this process may have; give "
            "it 4 GiB once, or compile elsewhere and bring the folder along, named by "
            "MODULAR_CACHE_DIR\n"
        )
        os.write(2, line.encode())
        os._exit(CompileError.exit_code)


def _own_bytes() -> int:
    """Memory that cannot be had back by forgetting what is in files."""
    for line in _STATUS.read_text(encoding="utf-8").split("\n"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
