"""Released models' sizes: what inspect tells of them, and their graphs for a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import cross_compile
import processes
import pytest
import torch
from full_sizes import FULL_SIZES, make_full_size_folder

from max_diffusion.pipelines.inspection import inspect

# One in every run; the others' graphs take half a minute each to build.
NAMES = [
    pytest.param(name, marks=() if name == "cogvideox-2b" else pytest.mark.slow)
    for name in FULL_SIZES
]


@pytest.mark.parametrize("name", NAMES)
def test_a_released_size_is_inspected(tmp_path: Path, name: str) -> None:
    size = FULL_SIZES[name]
    folder = make_full_size_folder(tmp_path / "full", name)
    report = inspect(folder, device="cpu", dtype="float32", true_guidance=True)
    with torch.device("meta"):
        counted = {
            role: sum(value.numel() for value in model.state_dict().values())
            for role, model in size.make_models(None).items()
        }
    found = {role: part.parameters for role, part in report.components.items()}
    assert found["transformer"] == counted["transformer"]
    assert (report.image_tokens, report.text_tokens) == size.tokens
    # Both branches, a float32 of every token's channels in every block.
    tokens = sum(size.tokens) + report.reference_tokens
    state = 2 * 4 * size.blocks * tokens * size.width
    assert report.caches["pab"].state_bytes == state


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZES)
@pytest.mark.parametrize(("part", "layers"), [("build", None), ("transformer:full", 1)])
def test_graphs_of_a_released_size_for_sm_90(
    tmp_path: Path, name: str, part: str, layers: int | None
) -> None:
    """All of them are built; of one block, the transformer compiles."""
    folder = make_full_size_folder(tmp_path / "full", name, layers)
    done = processes.run(sys.executable, cross_compile.__file__, folder, part)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
