"""Files that change after their headers were read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import lora_files
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from max.dtype import DType
from single_files import saved_gguf

from graphs.weights import WeightSlot, WeightSpec
from max_diffusion import ModelLoadError
from max_diffusion.checkpoint import ComponentWeights
from max_diffusion.checkpoint.gguf_file import read_gguf
from max_diffusion.checkpoint.lora import Lora, LoraNaming

F32 = DType.float32
SLOTS = {"x": WeightSlot("x.weight", (3, 32), F32)}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def overwrite(path: Path) -> None:
    """Other values of the same size, in place."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff" * 4)


def replace(path: Path) -> None:
    """Another file, by rename."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes() + b"\xff")
    other.rename(path)


def aged(path: Path) -> Path:
    """The same, written long ago: clocks of file systems are coarse."""
    os.utime(path, ns=(10**18, 10**18))
    return path


def safetensors(path: Path) -> ComponentWeights:
    lora_files.write(path, {"x.weight": torch.randn(3, 32)})
    return ComponentWeights.from_files("t", [aged(path)])


def gguf(path: Path) -> ComponentWeights:
    kind = GGMLQuantizationType.Q8_0
    saved_gguf(path, {"x.weight": torch.randn(3, 32)}, kind)
    return ComponentWeights("t", read_gguf(aged(path)).tensors)


def read(weights: ComponentWeights) -> np.ndarray:
    found = weights.load(SLOTS)["x"]
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("write", [safetensors, gguf])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"my/w: changed since it was read \((\d+) bytes then, (?!\1)\d+ now\)"),
        (overwrite, r"my/w: changed since it was read \((\d+) bytes then, \1 now\)"),
        (replace, "my/w: changed since it was read"),
        (Path.unlink, r"my/w: cannot be read again \(No such file"),
    ],
)
def test_weights_that_changed_are_not_read(
    tmp_path: Path,
    write: Callable[[Path], ComponentWeights],
    change: Callable[[Path], None],
    message: str,
) -> None:
    path = tmp_path / "my" / "w"
    path.parent.mkdir()
    weights = write(path)
    assert np.array_equal(read(weights), read(weights))
    change(path)
    for check_finite in (True, False):  # not where they are read again, either
        with pytest.raises(ModelLoadError, match=message) as caught:
            weights.load(SLOTS, check_finite=check_finite)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [cut, overwrite, replace, Path.unlink])
def test_loras_stay_what_they_were_or_are_refused(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    tensors = {
        "x.lora_A.weight": torch.randn(2, 32),
        "x.lora_B.weight": torch.randn(3, 2),
    }
    path = aged(lora_files.write(tmp_path / "my" / "style", tensors))
    naming = LoraNaming.of("t", is_denoiser=True)
    lora = Lora.open(path, {"t": (naming, {"x.weight": WeightSpec((3, 32), F32)})})
    weights = safetensors(tmp_path / "w").adapted(lora.adapters["t"])
    before = read(weights)
    change(path)
    if change in (cut, overwrite):
        with pytest.raises(ModelLoadError, match="my/style: changed since it was read"):
            read(weights)
    else:
        assert np.array_equal(read(weights), before)
