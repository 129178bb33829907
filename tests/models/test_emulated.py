"""Shipped graphs on processors that are not here, by user-mode emulation."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import processes
import pytest

from max_diffusion import load_pipeline
from max_diffusion.execution.graph_library import shipped_graphs

AARCH64 = "MAX_DIFFUSION_AARCH64_PYTHON"
"""Names a command that runs an aarch64 Python with ``modular``'s and numpy's wheels,
such as ``qemu-aarch64 -L ROOT ROOT/usr/bin/python3.11``."""
DRAW = """
import sys
from pathlib import Path
import numpy as np
from max_diffusion import load_pipeline
from max_diffusion.execution import processor_flags
from max_diffusion.execution.targets import host_targets
if len(sys.argv) > 2:
    processor_flags._CPUINFO = Path(sys.argv[2])  # emulation shows the real one's
pipeline = load_pipeline("demo", device="cpu", require_precompiled=True)
result = pipeline.generate("a red circle", seed=1, num_inference_steps=2)
np.save(sys.argv[1], result.images)
print(*(host.name for host in host_targets()), pipeline.compile_count)
"""


@pytest.mark.slow
def test_a_processor_with_avx2_only(tmp_path: Path) -> None:
    """Its operating system says what the real one has; numpy knows better."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("needs qemu-x86_64, of Debian's qemu-user")
    file = tmp_path / "there.npy"
    done = processes.run(qemu, "-cpu", "max", sys.executable, "-c", DRAW, file)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "linux-x86-64-v3 0\n"
    own = tmp_path / "own"
    own.mkdir()
    (own / "linux-x86-64-v3").symlink_to(shipped_graphs() / "linux-x86-64-v3")
    here = load_pipeline("demo", device="cpu", precompiled=[own])
    wanted = here.generate("a red circle", seed=1, num_inference_steps=2).images
    assert np.array_equal(np.load(file), wanted)


@pytest.mark.slow
def test_an_arm_processor(tmp_path: Path) -> None:
    command = os.environ.get(AARCH64)
    if command is None:
        pytest.skip(f"{AARCH64} is not set")
    file, info = tmp_path / "there.npy", tmp_path / "cpuinfo"
    info.write_text("Features\t: fp asimd atomics asimdhp lrcpc asimddp\n")
    # Not what MAX has told this process of its own place.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MODULAR_", "PYTHON"))
    }
    arguments = (*shlex.split(command), "-c", DRAW, file, info)
    done = processes.run(*arguments, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "linux-aarch64 0\n"
    here = load_pipeline("demo", device="cpu")
    wanted = here.generate("a red circle", seed=1, num_inference_steps=2).images
    assert np.abs(np.load(file).astype(int) - wanted).max() <= 1
