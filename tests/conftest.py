"""Everything that compiles, compiled once a session."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flux1_editing import as_pipeline
from folders import TEST_GRAPHS, make_flux_folder
from new_model import ToyPipeline, write_folder
from qwen_folder import make_qwen_folder

from max_diffusion import (
    CACHES,
    TaylorSeerConfig,
    TextToImagePipeline,
    demo_model_path,
    load_pipeline,
)
from max_diffusion.execution import compiler

if TYPE_CHECKING:
    from diffusers import FluxPipeline
    from max.engine import CompiledModel, InferenceSession

    from max_diffusion.execution.graph_module import GraphModule

COMPILED = pytest.StashKey[list[tuple[str, float]]]()
CPUS = pytest.StashKey[list[int]]()


def pytest_configure(config: pytest.Config) -> None:
    """In a worker of pytest-xdist: keeps to its share of the CPUs.

    Threads that compute together wait for each other. Where all workers have threads on
    all CPUs, those wait for the other workers', too: a run takes twice as long.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None:
        # MAX compiles this where it is first imported: of workers that do so together,
        # one finds what the other has written half of. Not in this process, in whose
        # environment an import of it leaves another Python.
        importing = [sys.executable, "-c", "import max._kv_cache_ops"]
        subprocess.run(importing, check=True)
    if sys.platform != "linux":
        return
    cpus = sorted(os.sched_getaffinity(0))
    config.stash[CPUS] = cpus
    if worker is None:
        return
    share = max(1, len(cpus) // worker["workercount"])
    first = share * int(worker["workerid"].removeprefix("gw"))
    own = {cpus[(first + i) % len(cpus)] for i in range(share)}
    os.sched_setaffinity(0, own)
    torch.set_num_threads(len(own))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Counts what is compiled, so that a run can say what it started from."""
    compiled: list[tuple[str, float]] = []
    session.config.stash[COMPILED] = compiled
    compile_ = compiler.compiled_module

    def counted(own: InferenceSession, module: GraphModule) -> CompiledModel:
        started = time.perf_counter()
        found = compile_(own, module)
        compiled.append((module.name, time.perf_counter() - started))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compiled_module", counted)
        return (yield)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: tells the run what this one compiled."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["compiled"] = session.config.stash[COMPILED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the run: hears it."""
    found = getattr(node, "workeroutput", {}).get("compiled", ())
    node.config.stash.setdefault(COMPILED, []).extend(map(tuple, found))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Tells what was compiled; processes that tests start are not counted."""
    compiled = config.stash.get(COMPILED, [])
    slow = [(name, seconds) for name, seconds in compiled if seconds > 1]
    total = sum(seconds for _, seconds in slow)
    terminalreporter.write_line(
        f"graphs: {len(slow)} modules compiled in {total:.0f} s, "
        f"{len(compiled) - len(slow)} found in MAX's cache"
    )
    for name, seconds in sorted(slow, key=lambda item: -item[1])[:8]:
        terminalreporter.write_line(f"  {name}: {seconds:.0f} s")


@pytest.fixture(scope="session")
def all_cpus(pytestconfig: pytest.Config) -> list[int]:
    """The CPUs of the whole run, on Linux, of which a worker has a share."""
    return pytestconfig.stash[CPUS]


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX.1 model in the diffusers layout, float32."""
    return make_flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def flux(flux_folder: Path) -> TextToImagePipeline:
    """The same model as a pipeline."""
    modules = TaylorSeerConfig(target="modules")  # has graphs that no default needs
    return load_pipeline(
        flux_folder,
        device="cpu",
        caches=(*CACHES, modules),
        precompiled=[TEST_GRAPHS / "float32"],
    )


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen-Image model in the diffusers layout, float32."""
    return make_qwen_folder(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def demo() -> TextToImagePipeline:
    """The demo model in float32, the same on every processor."""
    return load_pipeline("demo", device="cpu", dtype="float32", is_extensible=False)


@pytest.fixture(scope="session")
def demo_pictures() -> TextToImagePipeline:
    """The demo model for requests that bring pictures."""
    return load_pipeline(
        "demo", "cpu", "float32", is_extensible=False, takes_pictures=True
    )


@pytest.fixture(scope="session")
def demo_kontext(tmp_path_factory: pytest.TempPathFactory) -> TextToImagePipeline:
    """The demo model as a FLUX.1-Kontext, whose graphs are the same."""
    target = tmp_path_factory.mktemp("demo-kontext") / "model"
    folder = as_pipeline(demo_model_path(), target, "FluxKontextPipeline")
    return load_pipeline(
        folder, "cpu", "float32", is_extensible=False, takes_pictures=True
    )


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's model."""
    return write_folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> ToyPipeline:
    """The example's pipeline, with the graphs of every cache."""
    pipeline = load_pipeline(
        toy_folder,
        device="cpu",
        caches=tuple(CACHES),
        precompiled=[TEST_GRAPHS / "toy"],
    )
    assert isinstance(pipeline, ToyPipeline)
    return pipeline


@pytest.fixture(scope="session")
def reference(flux_folder: Path) -> FluxPipeline:
    """The random folder in diffusers."""
    return open_in_diffusers(flux_folder)


@pytest.fixture(scope="session")
def demo_reference() -> FluxPipeline:
    """The demo model in diffusers."""
    return open_in_diffusers(demo_model_path())


def open_in_diffusers(folder: Path) -> FluxPipeline:
    from diffusers import FluxPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
