"""What a model computes in where no dtype is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from max.driver import CPU
from max.dtype import DType
from safetensors.torch import save_file

from max_diffusion import ModelLoadError, RequestError
from max_diffusion.checkpoint import CheckpointFile
from max_diffusion.pipelines import compute_dtype as module
from max_diffusion.pipelines.compute_dtype import compute_dtype

HALF, FULL = torch.bfloat16, torch.float32


def stored(path: Path, *parts: tuple[torch.dtype, int]) -> Path:
    """Writes a file with so many numbers of each dtype."""
    tensors = {
        str(i): torch.zeros(count, dtype=dtype)
        for i, (dtype, count) in enumerate(parts)
    }
    save_file(tensors, path)
    return path


@pytest.fixture
def is_able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies bfloat16."""
    monkeypatch.setattr(module, "product_dtype", lambda dtype: dtype)


@pytest.mark.usefixtures("is_able")
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(HALF, 8)], DType.bfloat16),
        ([(FULL, 8)], DType.float32),
        ([(torch.float64, 8)], DType.float32),
        # Norms in float32, say; or a head in bfloat16.
        ([(HALF, 8), (FULL, 7)], DType.bfloat16),
        ([(HALF, 7), (FULL, 8)], DType.float32),
        ([(torch.float16, 8)], DType.bfloat16),
        ([(torch.float8_e4m3fn, 8), (FULL, 1)], DType.bfloat16),
    ],
)
def test_most_weights_decide(
    tmp_path: Path, parts: list[tuple[torch.dtype, int]], expected: DType
) -> None:
    path = stored(tmp_path / "a.safetensors", *parts)
    assert compute_dtype(None, CPU(), [path], None) == expected
    file = CheckpointFile.open(path, "transformer")
    assert compute_dtype(None, CPU(), [], file) == expected
    # Each part in a file of its own.
    files = [
        stored(tmp_path / f"{i}.safetensors", part) for i, part in enumerate(parts)
    ]
    assert compute_dtype(None, CPU(), files, None) == expected
    assert compute_dtype(
        None, CPU(), files[1:], CheckpointFile.open(files[0], "x")
    ) == (expected)


@pytest.mark.usefixtures("is_able")
def test_what_is_asked_for_counts(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", (HALF, 8))
    assert compute_dtype("float32", CPU(), [path], None) == DType.float32
    path = stored(tmp_path / "b.safetensors", (FULL, 8))
    assert compute_dtype("bfloat16", CPU(), [path], None) == DType.bfloat16
    with pytest.raises(RequestError, match="dtype: expected float32 or bfloat16, got"):
        compute_dtype("int8", CPU(), [path], None)


@pytest.mark.usefixtures("is_able")
def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", (HALF, 8))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ModelLoadError, match=r"a\.safetensors"):
        compute_dtype(None, CPU(), [path], None)


def test_other_processors_compute_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "product_dtype", lambda dtype: DType.float32)
    path = stored(tmp_path / "a.safetensors", (HALF, 8))
    assert compute_dtype(None, CPU(), [path], None) == DType.float32
    # Slow there, but what was asked for.
    assert compute_dtype("bfloat16", CPU(), [path], None) == DType.bfloat16
