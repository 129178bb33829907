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


def test_graphs_depend_on_the_sources_of_their_operations_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copies = []
    for path in kernels.kernel_sources():
        copies.append(tmp_path / path.name)
        copies[-1].write_text(path.read_text())
    monkeypatch.setattr(kernels, "kernel_sources", lambda: copies)
    names = ["diffusion_linear", "diffusion_attention", "diffusion_convolution"]
    hash_of = kernels.operations_hash.__wrapped__  # which remembers nothing

    def changed(source: str) -> list[bool]:
        """Whether each operation's hash is another after a change of a source."""
        before = [hash_of(frozenset([name])) for name in names]
        with (tmp_path / source).open("a") as file:
            file.write("# changed\n")
        after = [hash_of(frozenset([name])) for name in names]
        return [old != new for old, new in zip(before, after, strict=True)]

    assert changed("images.mojo") == [False, False, True]
    assert changed("lanes.mojo") == [True, True, True]  # through others
    assert changed("__init__.mojo") == [False, False, False]
    assert hash_of(frozenset(names)) == hash_of(frozenset(names[2:]))


def test_an_unknown_operation_is_made_of_all_sources() -> None:
    unknown = frozenset(["diffusion_convolution", "diffusion_of_another_release"])
    assert kernels.operations_hash(unknown) == kernels.kernel_hash()
