"""How many threads compute, and who says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from processes import run_python

from max_diffusion.core.control_groups import group_limits
from max_diffusion.core.host_threads import least_cpus, usable_cpus
from max_diffusion.errors import RequestError
from max_diffusion.execution.devices import resolve_device

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000"}, 2),
        ("0::/host/name\n", {"cpu.max": "400000 100000\n"}, 4),  # in a container
        ("0::/a\n", {"a/cpu.max": "1000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        (
            "4:cpu,cpuacct:/a\n0::/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            None,
        ),
    ],
)
def test_a_container_may_take_the_time_of_so_many_cpus(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = group_limits(
        "cpu",
        "cpu.max",
        ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
        groups=tmp_path / "groups",
        root=tmp_path / "root",
    )
    assert least_cpus(found) == limit


@needs_linux
def test_never_more_than_the_process_may_run_on() -> None:
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


_START = """
import os
from pathlib import Path
os.sched_setaffinity(0, {cpus})
from max_diffusion.core import host_threads
host_threads.group_cpu_limit = lambda: {limit}
allowed = os.sched_getaffinity(0)
from max_diffusion import load_pipeline
from max_diffusion.errors import RequestError
pipeline = load_pipeline("demo", device="cpu", caches=(), threads={threads})
assert {{*map(len, [allowed])}} == {{len(os.sched_getaffinity(int(task.name)))
    for task in Path("/proc/self/task").iterdir()}}, "tied to some CPUs"
print(host_threads.running_workers())
result = pipeline.generate("a red circle", num_inference_steps=2, seed=3)
import hashlib
print(hashlib.sha256(result.images.tobytes()).hexdigest())
try:
    load_pipeline("demo", device="cpu", caches=(), threads=len(allowed) + 7)
except RequestError as err:
    print(err)
"""


@needs_linux
def test_a_picture_is_the_same_on_one_thread_and_on_many(all_cpus: list[int]) -> None:
    cpus = len(all_cpus)
    if cpus < 2:
        pytest.skip("needs two CPUs")
    outputs = [
        run_python(_START.format(cpus=all_cpus, limit=limit, threads=threads))
        for limit, threads in ((None, None), (None, 1), (1, None))
    ]
    assert [done.stderr for done in outputs] == [""] * 3
    counts, pictures, errors = zip(
        *(done.stdout.splitlines() for done in outputs), strict=True
    )
    assert counts == (str(cpus), "1", "1")
    assert len(set(pictures)) == 1
    for count, error in zip(counts, errors, strict=True):
        assert error == (
            f"threads: got {cpus + 7}, but {count} run in this process already, since "
            "its first model; say it there"
        )


_KERNELS = """
import os, sys
import pytest
os.sched_setaffinity(0, {cpus})
code = pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *{files}])
from max_diffusion.core.host_threads import running_workers
print(running_workers())
sys.exit(code)
"""


@needs_linux
def test_kernels_hold_on_all_cpus(all_cpus: list[int]) -> None:
    """The same tests, with threads that a worker's share of the CPUs does not have."""
    names = "test_kernels.py", "test_convolution.py", "test_frame_convolution.py"
    files = [str(Path(__file__).with_name(name)) for name in names]
    done = run_python(_KERNELS.format(cpus=all_cpus, files=files))
    assert done.returncode == 0, done.stdout + done.stderr
    *_, counts, threads = done.stdout.splitlines()
    assert " passed" in counts
    assert int(threads) == len(all_cpus)


_IDLE = """
import time
from pathlib import Path
from max_diffusion import load_pipeline
pipeline = load_pipeline("demo", device="cpu", caches=())
pipeline.generate("a red circle", num_inference_steps=2, seed=3)

def wakings():
    found = 0
    for task in Path("/proc/self/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            name, _, value = line.partition(":")
            found += int(value) if name == "voluntary_ctxt_switches" else 0
    return found

time.sleep(0.5)
before = wakings()
time.sleep(2)
print(wakings() - before)
"""


@needs_linux
def test_the_threads_of_a_model_that_idles_sleep() -> None:
    """Left to itself, one of MAX's wakes thousands of times a second."""
    done = run_python(_IDLE)
    assert done.stderr == ""
    assert int(done.stdout) < 500


@pytest.mark.parametrize(
    ("threads", "message"),
    [
        (0, "threads must be at least 1, got 0"),
        (1.5, "threads must be a whole number, got 1.5"),
        (True, "threads must be a whole number, got True"),
    ],
)
def test_threads_are_counted(threads: object, message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}$"):
        resolve_device("cpu", threads)  # type: ignore[arg-type]


@needs_linux
def test_more_threads_than_cpus_are_refused() -> None:
    done = run_python(
        "from max_diffusion.execution.devices import resolve_device\n"
        "resolve_device('cpu', 4097)"
    )
    assert done.stderr.strip().endswith(
        f"threads: expected 1 to {usable_cpus()}, the CPUs this process may use, got "
        "4097"
    )
