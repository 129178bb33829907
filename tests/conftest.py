"""Everything that compiles, compiled once a session."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from folders import make_flux_folder
from new_model import ToyPipeline, write_folder

from max_diffusion import (
    CACHES,
    TaylorSeerConfig,
    TextToImagePipeline,
    demo_model_path,
    load_pipeline,
)

if TYPE_CHECKING:
    from diffusers import FluxPipeline


TEST_GRAPHS = Path(__file__).parent / "graphs"
"""What scripts/prebuild compiles of :func:`flux`."""


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
        precompiled=[TEST_GRAPHS],
    )


@pytest.fixture(scope="session")
def demo() -> TextToImagePipeline:
    """The demo model with the graphs that the command line compiles."""
    return load_pipeline("demo", device="cpu", is_extensible=False)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's model."""
    return write_folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> ToyPipeline:
    """The example's pipeline, with the graphs of every cache."""
    pipeline = load_pipeline(toy_folder, device="cpu", caches=tuple(CACHES))
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
