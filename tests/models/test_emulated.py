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
from pictures import psnr

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
from max_diffusion.execution import processor_flags, targets
file, dtype, *info = sys.argv[1:]
if info:
    # Emulation shows the real one's, and Mojo's compiler is not there.
    processor_flags._CPUINFO = Path(info[0])
    targets.compiler_features = lambda: frozenset(["+bf16"])
pipeline = load_pipeline("demo", "cpu", dtype, require_precompiled=True)
result = pipeline.generate("a red circle", seed=1, num_inference_steps=2)
np.save(file, result.images)
print(*(host.name for host in targets.host_targets()), pipeline.compile_count)
"""


@pytest.mark.slow
def test_a_processor_with_avx2_only(tmp_path: Path) -> None:
    """Its operating system says what the real one has; numpy knows better."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("needs qemu-x86_64, of Debian's qemu-user")
    file = tmp_path / "there.npy"
    done = processes.run(
        qemu, "-cpu", "max", sys.executable, "-c", DRAW, file, "float32"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "linux-x86-64-v3 0\n"
    own = tmp_path / "own"
    own.mkdir()
    (own / "linux-x86-64-v3").symlink_to(shipped_graphs() / "linux-x86-64-v3")
    here = load_pipeline("demo", "cpu", "float32", precompiled=[own])
    wanted = here.generate("a red circle", seed=1, num_inference_steps=2).images
    assert np.array_equal(np.load(file), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "flags", "found"),
    [
        ("float32", "", "linux-aarch64"),
        ("bfloat16", " bf16", "linux-aarch64-bf16 linux-aarch64"),
    ],
)
def test_an_arm_processor(tmp_path: Path, dtype: str, flags: str, found: str) -> None:
    command = os.environ.get(AARCH64)
    if command is None:
        pytest.skip(f"{AARCH64} is not set")
    file, info = tmp_path / "there.npy", tmp_path / "cpuinfo"
    info.write_text(f"Features\t: fp asimd atomics asimdhp lrcpc asimddp{flags}\n")
    # Not what MAX has told this process of its own place.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MODULAR_", "PYTHON"))
    }
    arguments = (*shlex.split(command), "-c", DRAW, file, dtype, info)
    done = processes.run(*arguments, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{found} 0\n"
    here = load_pipeline("demo", device="cpu", dtype="float32")
    wanted = here.generate("a red circle", seed=1, num_inference_steps=2).images
    drawn = np.load(file)
    if dtype == "float32":
        assert np.abs(drawn.astype(int) - wanted).max() <= 1
    else:
        assert psnr(drawn, wanted) > 40
