"""What the control groups of Linux, as containers have them, allow this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

_GROUPS: Final = Path("/proc/self/cgroup")
_ROOT: Final = Path("/sys/fs/cgroup")


def group_limits(
    controller: str,
    current: str,
    older: Sequence[str],
    *,
    groups: Path = _GROUPS,
    root: Path = _ROOT,
) -> list[str]:
    """Returns what limit files say, of the process's own group and of all around it.

    Args:
        controller: As the kernel calls it: ``memory``, ``cpu``.
        current: The limit's file in version 2 of control groups.
        older: Its files in version 1, of which the texts are joined by a space.
        groups: File in which Linux lists the process's groups.
        root: Folder that the groups' files are in.
    """
    limits: list[str] = []
    try:
        lines = groups.read_text(encoding="utf-8").split("\n")
    except OSError:  # not Linux
        return limits
    for line in filter(None, lines):
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            place, files = root, [current]
        elif controller in controllers.split(","):
            # Controllers of one hierarchy may share a folder, or have a link to it.
            shared = root / controllers
            place = shared if shared.is_dir() else root / controller
            files = list(older)
        else:
            continue
        group = place / name.lstrip("/")
        # In a container the name may be the host's, and the root this group itself.
        for folder in (group, *group.parents):
            if all((folder / file).is_file() for file in files):
                texts = [(folder / file).read_text(encoding="utf-8") for file in files]
                limits.append(" ".join(text.strip() for text in texts))
            if folder == place:
                break
    return limits
