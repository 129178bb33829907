"""Where MAX keeps compiled graphs, settled before it compiles any.

MAX 26.7 wants a folder it can write to: where it finds none (``HOME=/`` under a user id
of a container), it takes gigabytes or fails with a page of text, minutes later.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

# Private, but the only way that leaves this process's environment alone; MAX's own
# eager interpreter asks it too.
from max._core.engine import max_cache_dir, set_global_value

from ..errors import CompileError

logger = logging.getLogger(__name__)

# The demo model's graphs take 39 MB, with those of all caches 79.
_MIN_FREE_BYTES: Final = 64 * 2**20


def prepared_compile_cache() -> Path:
    """Returns the folder that MAX has for compiled graphs.

    Raises:
        CompileError: There is none, see :func:`prepare_compile_cache`.
    """
    prepare_compile_cache()
    found = max_cache_dir()
    assert found is not None
    return found


def prepare_compile_cache() -> None:
    """Sees to it that MAX has a folder for compiled graphs.

    The folder MAX chooses by itself (from ``MODULAR_CACHE_DIR``, ``MODULAR_HOME``,
    ``XDG_CACHE_HOME`` or ``HOME``) stays where it can be written to. Otherwise it is
    one of this user's own in the temporary folder, in which the graphs of the other one
    are found too; one line of the log says so. Asked again, it does nothing.

    Raises:
        CompileError: No folder can be written to, and none has compiled graphs.
    """
    found = max_cache_dir()  # ends in .max_cache, unless MODULAR_MAX_CACHE_DIR is set
    problem = "there is no home to keep compiled graphs in"
    if found is not None:
        problem = _problem(found)
        if not problem:
            return
    try:
        folder = _own_folder()
    except OSError as err:
        said = err.strerror or err
        advice = "set MODULAR_CACHE_DIR to a folder with room that can be written to"
        if found is None or not _files(found):
            raise CompileError(f"compile cache: {problem}; {said}; {advice}") from err
        logger.warning(
            "compile cache: %s; %s; what is not there yet is compiled anew each time: "
            "%s",
            problem,
            said,
            advice,
        )
        return
    target = folder / ".max_cache"
    if found is not None:
        _link(found, target)
    set_global_value("cache_dir", str(folder))
    set_global_value("max.cache_dir", str(target))
    logger.warning(
        "compile cache: %s; compiled graphs are kept in %s (MODULAR_CACHE_DIR chooses "
        "another folder)",
        problem,
        folder,
    )


def _problem(folder: Path) -> str:
    """Why graphs cannot be kept in a folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions do not tell all
            has_room = shutil.disk_usage(folder).free >= _MIN_FREE_BYTES
    except OSError as err:
        return f"{folder} cannot be written to ({err.strerror or err})"
    return "" if has_room else f"the disk of {folder} is full"


def _own_folder() -> Path:
    """A folder in the temporary one that only this user can read and write.

    Compiled graphs are code: one that somebody else could have put there is refused.

    Raises:
        OSError: There is none.
    """
    base = Path(tempfile.gettempdir())
    base_mode = base.stat().st_mode
    if base_mode & 0o022 and not base_mode & stat.S_ISVTX:
        raise OSError(f"in {base} others may replace files")
    user = os.geteuid()
    folder = base / f"max_diffusion-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == user
    if not is_own or status.st_mode & 0o077:
        raise OSError(f"{folder} is not this user's alone")
    if problem := _problem(folder):
        raise OSError(problem)
    return folder


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.rglob("*") if path.is_file()]
    except OSError:
        return []


def _link(source: Path, target: Path) -> None:
    """Makes files of one folder findable in another."""
    for path in _files(source):
        link = target / path.relative_to(source)
        with suppress(OSError):  # then it is compiled
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink():
                link.unlink()  # of an earlier run; perhaps to what is no longer there
            if not link.exists():
                link.symlink_to(path.absolute())
