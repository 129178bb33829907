"""How much memory there is, and a word before all of it is taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import run_python

from max_diffusion.core.control_groups import group_limits
from max_diffusion.core.host_memory import host_memory, least_bytes


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "1000\n", "a/memory.max": "700\n"}, 700),
        ("0::/a/b\n", {"a/b/memory.max": "1000\n", "a/memory.max": "max\n"}, 1000),
        ("0::/\n", {"memory.max": "500\n"}, 500),  # in a container
        ("0::/host/name\n", {"memory.max": "500\n"}, 500),  # likewise
        ("0::/a\n", {"a/memory.max": "max\n"}, None),
        ("0::/a\n", {}, None),
        (
            "9:cpu,memory:/a\n3:cpuset:/\n0::/\n",
            {"memory/a/memory.limit_in_bytes": "2000\n"},
            2000,
        ),
        (
            "4:memory:/docker/0123\n",
            {"memory/memory.limit_in_bytes": "2000\n"},
            2000,
        ),
        (
            "4:memory:/a\n",
            {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"},
            None,
        ),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "2000\n"}, None),
    ],
)
def test_the_limit_is_the_least_of_all_groups_around(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = group_limits(
        "memory",
        "memory.max",
        ("memory.limit_in_bytes",),
        groups=tmp_path / "groups",
        root=tmp_path / "root",
    )
    assert least_bytes(found) == limit


def test_elsewhere_there_is_no_limit_and_never_more_than_the_machine_has(
    tmp_path: Path,
) -> None:
    missing = tmp_path / "missing"
    found = group_limits("memory", "memory.max", (), groups=missing, root=tmp_path)
    assert least_bytes(found) is None
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < host_memory() <= installed


_TAKE = """
import time
from max_diffusion.execution import compile_memory
compile_memory.group_memory_limit = lambda: {limit} * 2**20
with compile_memory.memory_watched():
    taken = b"x" * (300 * 2**20)
    time.sleep({seconds})
print("compiled")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_compile_that_takes_too_much_ends_with_a_line() -> None:
    done = run_python(_TAKE.format(limit=320, seconds=60))
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: compile: after ")
    assert "MiB of the 320 MiB this process may have; give it 4 GiB" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run_python(_TAKE.format(limit=4096, seconds=0.2))
    assert (done.returncode, done.stdout, done.stderr) == (0, "compiled\n", "")
