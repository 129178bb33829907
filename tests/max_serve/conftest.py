"""A server of each module's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lora_files
import pytest
from max_serving import Server, serving

from max_diffusion import TextToImagePipeline, demo_model_path


@pytest.fixture(scope="package")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the demo model."""
    shapes = lora_files.matrices(demo_model_path(), "transformer")
    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    return lora_files.write(path, lora_files.lora("kohya", shapes, strength=0.1))


# The demo comes first: what it has compiled, the server finds.
@pytest.fixture(scope="module")
def server(
    demo: TextToImagePipeline, lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Of the demo model, with the LoRA as ``style``, for pictures too."""
    folder = tmp_path_factory.mktemp("max_serve")
    own = {"PICTURES": "1", "LORAS": f"style={lora}"}
    with serving(demo_model_path(), folder, own) as server:
        yield server
