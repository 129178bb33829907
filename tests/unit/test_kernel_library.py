"""The operations for CPUs are precompiled once, whole, or said to be refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from max_diffusion import CompileError
from max_diffusion.execution import kernels
from max_diffusion.execution.recipe import source_files


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A new folder for compiled graphs."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(kernels, "prepared_compile_cache", lambda: folder)
    return folder


def test_the_library_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = kernels.kernel_library()
    assert library.parent == cache.resolve()
    assert library.stat().st_size > 10_000
    assert list(cache.iterdir()) == [library]

    def refused(sources: Path, target: Path) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(kernels, "_precompile", refused)
    assert kernels.kernel_library() == library


def test_refused_sources_are_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken" / "__init__.mojo"
    broken.parent.mkdir()
    broken.write_text("def f(:\n")
    monkeypatch.setattr(kernels, "kernel_sources", lambda: [broken])
    with pytest.raises(CompileError) as caught:
        kernels.kernel_library()
    assert str(caught.value).startswith(
        "compile: the operations for CPUs cannot be precompiled: "
    )
    assert "error: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


def test_a_folder_that_cannot_be_written_to_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    monkeypatch.setattr(kernels, "prepared_compile_cache", lambda: missing)
    with pytest.raises(CompileError, match=r"cannot be precompiled: .*missing"):
        kernels.kernel_library()


def test_sources_of_the_operations_are_part_of_a_recipe() -> None:
    own = kernels.kernel_sources()
    assert len(own) > 8
    assert set(own) <= set(source_files())
