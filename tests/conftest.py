"""Everything that compiles, compiled once a session."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import make_flux_folder
from new_model import ToyPipeline, make_pipeline

from max_diffusion import TextToImagePipeline, load_pipeline


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX.1 model in the diffusers layout, float32."""
    return make_flux_folder(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def flux(flux_folder: Path) -> TextToImagePipeline:
    """The same model as a pipeline."""
    return load_pipeline(flux_folder, device="cpu")


@pytest.fixture(scope="session")
def toy() -> ToyPipeline:
    """The example's pipeline."""
    return make_pipeline()


@pytest.fixture(scope="session")
def reference(flux_folder: Path) -> Iterator[object]:
    """The same folder in diffusers."""
    from diffusers import FluxPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        pipeline = FluxPipeline.from_pretrained(flux_folder)
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
