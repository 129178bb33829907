"""The demo model on a GPU, and on the CPU beside it.

``scripts/gpu_check --only tests`` runs these tests. MAX_DIFFUSION_TEST_DEVICE=cpu tries
their code without a GPU, with ``-m gpu -k "not bfloat16 and not one_head"`` in seconds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from folders import make_uniform_folder
from max.driver import Device

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    TaylorSeerConfig,
    TextToImagePipeline,
    load_pipeline,
)
from max_diffusion.execution.devices import resolve_device

CACHES_OF_ALL_GRAPHS: Sequence[str | AbstractCacheConfig] = (
    *CACHES,
    TaylorSeerConfig(target="modules"),
)


@pytest.fixture(scope="session")
def device_name() -> str:
    """What is tested, as ``load_pipeline`` takes it."""
    return os.environ.get("MAX_DIFFUSION_TEST_DEVICE", "gpu")


@pytest.fixture(scope="session")
def device(device_name: str) -> Device:
    return resolve_device(device_name)


@pytest.fixture(scope="session")
def precompiled() -> Sequence[str]:
    """Folders of graphs that need not be compiled."""
    folders = os.environ.get("MAX_DIFFUSION_TEST_GRAPHS", "")
    return [folder for folder in folders.split(os.pathsep) if folder]


@pytest.fixture(scope="session")
def on_cpu() -> TextToImagePipeline:
    """The demo model, with the graphs of every cache."""
    return load_pipeline("demo", "cpu", "float32", caches=CACHES_OF_ALL_GRAPHS)


@pytest.fixture(scope="session")
def single(device_name: str, precompiled: Sequence[str]) -> TextToImagePipeline:
    """The same on the GPU in float32."""
    return load_pipeline(
        "demo",
        device_name,
        "float32",
        caches=CACHES_OF_ALL_GRAPHS,
        precompiled=precompiled,
    )


@pytest.fixture(scope="session")
def half(device_name: str, precompiled: Sequence[str]) -> TextToImagePipeline:
    """The demo model on the GPU in bfloat16, with what the command line loads."""
    return load_pipeline("demo", device_name, "bfloat16", precompiled=precompiled)


@pytest.fixture(scope="session")
def one_head_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose heads are FLUX.1's: 128 channels."""
    return make_uniform_folder(tmp_path_factory.mktemp("one-head"))
