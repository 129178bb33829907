"""Graphs that ``max-diffusion compile`` has made for a GPU, on that GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import pytest
from max.driver import Device
from max.dtype import DType

from max_diffusion import open_model
from max_diffusion.core.buffers import from_numpy, to_device, to_numpy
from max_diffusion.execution.artefacts import artefacts_in
from max_diffusion.execution.compiler import CompiledGraphs, open_session
from max_diffusion.execution.graph_library import GraphLibrary
from max_diffusion.execution.targets import Target, parse_target, targets_of
from max_diffusion.exporting.job import modules_of

pytestmark = pytest.mark.gpu

COMPILE = """
import sys
from max_diffusion.exporting import Model
from max_diffusion.exporting.job import Job
Job(Model(), "sampler", sys.argv[1], sys.argv[2]).run()
print("done", flush=True)
import os
os._exit(0)  # MAX 26.7 aborts in the teardown of a session that ran nothing
"""
SAYS = """
import sys
from max import driver
api, _, architecture = sys.argv[1].partition(":")
driver.set_virtual_device_api(api)
driver.set_virtual_device_target_arch(architecture)
driver.set_virtual_device_count(1)
device = driver.Accelerator()
print(f"{device.api}:{device.architecture_name}")
"""


def words_for(target: Target) -> str:
    """As ``--target`` takes it."""
    own = target.host.name
    return own if target.gpu is None else f"{target.gpu}+{own}"


@pytest.fixture(scope="module")
def target(device: Device) -> Target:
    found = targets_of(device)
    assert found, "nothing that graphs are compiled for runs on this processor"
    return found[0]


def test_the_gpu_is_called_what_compile_takes(
    target: Target, record_property: Callable[[str, object], None]
) -> None:
    record_property("target", words_for(target))
    assert parse_target(words_for(target)) == target


def test_a_virtual_one_of_that_name_says_the_same(target: Target) -> None:
    """Else what is compiled elsewhere is not found here: sm_90 beside sm_90a, say."""
    if target.gpu is None:
        pytest.skip("no GPU")
    done = processes.run(sys.executable, "-c", SAYS, target.gpu)
    assert (done.returncode, done.stdout) == (0, f"{target.gpu}\n"), done.stderr


@pytest.fixture(scope="module")
def folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest module, compiled in a process that has no such GPU."""
    path = tmp_path_factory.mktemp("graphs")
    done = processes.run(sys.executable, "-c", COMPILE, words_for(target), path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    return path


def test_what_is_compiled_for_it_runs_on_it(
    target: Target, folder: Path, device: Device, device_name: str
) -> None:
    assert len(artefacts_in(folder / target.name, "sampler")) == 1
    pipeline = open_model("demo", device_name)
    [sampler] = [m for m in modules_of(pipeline) if m.name == "sampler"]
    library = GraphLibrary(device, [folder], is_required=True)
    graphs = CompiledGraphs(open_session(device), device, library)
    graphs.add([sampler], dict)
    assert graphs.compile_count == 0
    rng = np.random.default_rng(0)
    latents, velocity = rng.standard_normal((2, 2, 5, 3), np.float32)
    dt = np.array([-0.25, -0.5], np.float32)
    [moved] = graphs.models["euler_step"].execute(
        to_device(latents, device),
        from_numpy(velocity, pipeline.dtype, device),
        to_device(dt, device),
    )
    # bfloat16 keeps 8 bits of the velocity: an error of 2 ** -9 of it.
    error = 0.0 if pipeline.dtype == DType.float32 else 2.0**-9
    limit = 1e-6 + error * 0.5 * float(np.abs(velocity).max())
    wanted = latents + dt[:, None, None] * velocity
    assert np.abs(to_numpy(moved) - wanted).max() <= limit
