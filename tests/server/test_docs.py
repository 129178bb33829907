"""Every example of docs/serving.md, as it is printed there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import lora_files
import pytest
from PIL import Image
from processes import run
from serving import Served, served

from max_diffusion import demo_model_path, load_pipeline
from max_diffusion.serving.http.schemas import ImageGenerationRequest

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
# Those that start a server, ask MAX's own or Ray's, or for videos, have tests of their
# own.
CURL = [text for kind, text in BLOCKS if "/v1/images/" in text and kind == "bash"]
PYTHON = [
    text
    for kind, text in BLOCKS
    if kind == "python" and "ray_serve" not in text and "videos" not in text
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo model that takes pictures, with the LoRAs that the page has."""
    shapes = lora_files.matrices(demo_model_path(), "transformer")
    folder = tmp_path_factory.mktemp("loras")
    files = {
        name: lora_files.write(
            folder / f"{name}.safetensors", lora_files.lora("peft", shapes)
        )
        for name in ("style", "ink")
    }
    demo = load_pipeline(
        "demo", device="cpu", is_extensible=False, adapters=files, takes_pictures=True
    )
    with served(demo) as server:
        yield server


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def save_pictures(folder: Path) -> None:
    """Saves what the examples begin with: a picture of an earlier one, and a mask."""
    Image.new("RGB", (64, 48), "gray").save(folder / "picture-0.png")
    Image.new("L", (64, 48), "white").save(folder / "mask.png")


def test_the_page_has_examples() -> None:
    assert (len(CURL), len(PYTHON)) == (4, 4)


@pytest.mark.parametrize("text", CURL, ids=["picture", "stream", "edit", "loras"])
def test_curl(server: Served, tmp_path: Path, text: str) -> None:
    save_pictures(tmp_path)
    code = text.replace(ADDRESS, server.url).replace("python3", sys.executable)
    done = run("bash", "-euo", "pipefail", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if "out.png" in code:
        assert size_of(tmp_path / "out.png") == (128, 128)
    elif "loras" in code:
        assert '"b64_json"' in done.stdout
    elif "edits" in code:
        assert json.loads(done.stdout)["max_diffusion"]["steps"] == 26  # of 28
    else:
        assert done.stdout.count("event: image_generation.partial_image") == 2
        assert "event: image_generation.completed" in done.stdout


@pytest.mark.parametrize("text", PYTHON, ids=["client", "stream", "edit", "engine"])
def test_python(server: Served, tmp_path: Path, text: str) -> None:
    save_pictures(tmp_path)
    done = run(sys.executable, "-c", text.replace(ADDRESS, server.url), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "edited.png" in text:
        assert size_of(tmp_path / "edited.png") == (64, 48)
        assert done.stdout == "20 steps\n"
    elif "picture-" in text:
        assert size_of(tmp_path / "picture-1.png") == (128, 128)
        assert "of 56" in done.stdout


def test_every_field_is_told() -> None:
    for name in ImageGenerationRequest.model_fields:
        assert f"`{name}`" in TEXT, name


def test_every_option_named_is_one() -> None:
    help_text = run(
        sys.executable, "-m", "max_diffusion.cli.main", "serve", "--help"
    ).stdout
    section = TEXT[TEXT.index("## Options") : TEXT.index("## From Python")]
    for option in re.findall(r"--[a-z-]+", section):
        assert option in help_text or option == "--help", option
