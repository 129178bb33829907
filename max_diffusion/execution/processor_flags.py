"""What the operating system says of this machine's processors."""

from __future__ import annotations

import re
import sys
from collections.abc import Set
from pathlib import Path
from typing import Final

_CPUINFO: Final = Path("/proc/cpuinfo")


def system_flags() -> Set[str]:
    """Returns what the operating system says that every processor has."""
    if sys.platform != "linux":
        return frozenset()
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    each = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    sets = [frozenset(line.split()) for line in each]
    return frozenset.intersection(*sets) if sets else frozenset()
