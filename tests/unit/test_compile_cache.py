"""Where compiled graphs are kept on machines with no home, no room, no permission.

In processes of their own: MAX remembers what it was told. What cannot be written to is
in ``/proc``, where root may not write either.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from max_diffusion.execution import compile_cache

_PREPARE = """
import shutil, sys, tempfile
from max._core.engine import max_cache_dir
from max_diffusion import MaxDiffusionError
from max_diffusion.execution import compile_cache
{before}
try:
    for _ in range(2):  # the second time it has nothing to say
        compile_cache.prepare_compile_cache()
except MaxDiffusionError as err:
    print(type(err).__name__, err)
print(max_cache_dir())
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs Linux's /proc"
)


def prepare(
    temporary: Path, before: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    names = ("MODULAR_CACHE_DIR", "MODULAR_HOME", "MODULAR_MAX_CACHE_DIR")
    plain = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.run(
        [sys.executable, "-c", _PREPARE.format(before=before)],
        env=plain | {"TMPDIR": str(temporary)} | variables,
        capture_output=True,
        text=True,
        check=True,
    )


def own(temporary: Path) -> Path:
    return temporary / f"max_diffusion-{os.geteuid()}"


def test_a_folder_that_can_be_written_to_stays(tmp_path: Path) -> None:
    done = prepare(tmp_path, MODULAR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout == f"{tmp_path / 'cache' / '.max_cache'}\n"
    assert done.stderr == ""
    assert not own(tmp_path).exists()


@pytest.mark.parametrize(
    ("variable", "problem"),
    [
        ("MODULAR_CACHE_DIR", "/proc/x/.max_cache cannot be written to (No such file"),
        ("MODULAR_MAX_CACHE_DIR", "/proc/x cannot be written to (No such file"),
        ("MODULAR_HOME", "there is no home to keep compiled graphs in; "),
    ],
)
def test_else_it_is_one_of_this_users_own_and_that_is_said_once(
    tmp_path: Path, variable: str, problem: str
) -> None:
    done = prepare(tmp_path, **{variable: "/proc/x"})
    folder = own(tmp_path)
    assert done.stdout == f"{folder / '.max_cache'}\n"
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"compile cache: {problem}")
    assert f"compiled graphs are kept in {folder} " in done.stderr
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_full_disk_is_none(tmp_path: Path) -> None:
    before = """
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=2**20 * (1 + 999 * (
    "max_diffusion-" in str(path))))
"""
    done = prepare(tmp_path, before, MODULAR_CACHE_DIR=str(tmp_path / "full"))
    assert done.stdout == f"{own(tmp_path) / '.max_cache'}\n"
    assert f"the disk of {tmp_path / 'full' / '.max_cache'} is full" in done.stderr


def planted(folder: Path) -> None:
    folder.mkdir(mode=0o755)


def linked(folder: Path) -> None:
    (folder.parent / "other").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "other")


def a_file(folder: Path) -> None:
    folder.touch(mode=0o600)


@pytest.mark.parametrize("plant", [planted, linked, a_file])
def test_a_folder_that_others_could_have_put_there_is_refused(
    tmp_path: Path, plant: object
) -> None:
    plant(own(tmp_path))  # type: ignore[operator]
    done = prepare(tmp_path, MODULAR_HOME="/proc/x")
    assert done.stdout == (
        "CompileError compile cache: there is no home to keep compiled graphs in; "
        f"{own(tmp_path)} is not this user's alone; set MODULAR_CACHE_DIR to a folder "
        "with room that can be written to\nNone\n"
    )
    assert done.stderr == ""


def test_a_temporary_folder_where_others_may_replace_files_is_refused(
    tmp_path: Path,
) -> None:
    tmp_path.chmod(0o777)
    done = prepare(tmp_path, MODULAR_HOME="/proc/x")
    assert f"in {tmp_path} others may replace files" in done.stdout
    assert not own(tmp_path).exists()
    tmp_path.chmod(0o1777)  # as /tmp is
    done = prepare(tmp_path, MODULAR_HOME="/proc/x")
    assert done.stdout == f"{own(tmp_path) / '.max_cache'}\n"


def test_nothing_to_write_to_is_one_line_that_names_the_variable(
    tmp_path: Path,
) -> None:
    before = """
def nowhere():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
tempfile.gettempdir = nowhere
"""
    done = prepare(tmp_path, before, MODULAR_CACHE_DIR="/proc/x")
    assert done.stdout.startswith(
        "CompileError compile cache: /proc/x/.max_cache cannot be written to"
    )
    assert "No usable temporary directory found in ['/tmp']; set MODULAR_CACHE_DIR" in (
        done.stdout
    )
    assert done.stdout.count("\n") == 2


def test_graphs_of_a_folder_that_is_only_read_are_found_in_the_other(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "mof" / "mef").mkdir(parents=True)
    (source / "mof" / "mef" / "one").write_bytes(b"1")
    (source / "mof" / "mef" / "two").write_bytes(b"2")
    (target / "mof" / "mef").mkdir(parents=True)
    (target / "mof" / "mef" / "two").write_bytes(b"own")
    (target / "mof" / "mef" / "one").symlink_to(tmp_path / "gone")
    for _ in range(2):
        compile_cache._link(source, target)
        names = sorted(path.name for path in target.rglob("*") if path.is_file())
        assert names == ["one", "two"]
        assert (target / "mof" / "mef" / "one").read_bytes() == b"1"
        assert (target / "mof" / "mef" / "two").read_bytes() == b"own"
