"""What a benchmark makes once: environments, exports and models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.artefact_cache import digest, made_once
from benchmarks.harness.models import (
    DEMO,
    LARGE,
    model_digest,
    model_folder,
)
from benchmarks.harness.runtimes import (
    TORCH,
    Environment,
    PeerError,
    exported,
)
from max_diffusion.checkpoint import find_model


def test_an_environment_that_cannot_be_made_is_a_peer_not_run(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="its environment is not made"):
        TORCH.python(tmp_path, may_install=False)
    assert list(tmp_path.iterdir()) == []
    bad = Environment("bad", ("./no such folder",))
    with pytest.raises(PeerError, match=r"pip failed: ERROR: .*no such folder"):
        bad.python(tmp_path, may_install=True)
    with pytest.raises(PeerError, match="its environment is not made"):
        bad.python(tmp_path, may_install=False)


def test_an_environment_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []
    module = "benchmarks.harness.runtimes._run"
    monkeypatch.setattr(module, lambda line, what: lines.append(line))
    own = Environment("own", ("thing==1",))
    python = tmp_path / "environments" / "own" / "bin" / "python"
    for _ in range(2):
        assert own.python(tmp_path, may_install=True) == python
    assert sum("thing==1" in line for line in lines) == 1
    assert own.python(tmp_path, may_install=False) == python
    other = replace(own, requirements=("thing==2",))
    with pytest.raises(PeerError):
        other.python(tmp_path, may_install=False)
    other.python(tmp_path, may_install=True)
    assert sum("thing==2" in line for line in lines) == 1


def test_what_is_kept_is_made_again_of_something_else(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        made.append(folder)
        (folder / "x").touch()

    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise PeerError("no space")

    kept = tmp_path / "a" / "b"
    with pytest.raises(FileNotFoundError):
        made_once(kept, "first", None)
    with pytest.raises(PeerError):
        made_once(kept, "first", fails)
    for of in ("first", "first", "second", "second"):
        assert made_once(kept, of, make) == kept
    assert made == [kept, kept]
    assert made_once(kept, "second", None) == kept
    with pytest.raises(FileNotFoundError):
        made_once(kept, "first", None)


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found = []
    for name, content in (("x", "1"), ("x", "2"), ("y", "2")):
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / name).write_text(content)
        found += [digest([tmp_path, "k"]), digest([tmp_path]), digest(["k", tmp_path])]
    assert len({*found}) == len(found)
    assert digest([tmp_path, "k"]) == found[-3]
    assert digest(["ab", "c"]) != digest(["a", "bc"])


def test_a_model_is_exported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []
    module = "benchmarks.harness.runtimes._run"
    monkeypatch.setattr(module, lambda line, what: lines.append(line))
    target = tmp_path / "target"
    python = tmp_path / "bin" / "python"

    def export(of: str, *, may_export: bool) -> Path:
        return exported(tmp_path, of, target, python, may_export=may_export)

    with pytest.raises(PeerError, match="not exported; run once without --quick"):
        export("a model", may_export=False)
    for of in ("a model", "a model", "it retrained"):
        assert export(of, may_export=True) == target
    assert export("it retrained", may_export=False) == target
    assert len(lines) == 2
    assert lines[0][0] == str(tmp_path / "bin" / "optimum-cli")
    assert lines[0][-1] == str(target)


def test_the_large_model_is_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged = model_digest(LARGE)
    assert unchanged != model_digest(DEMO)
    small = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
    }
    module = "benchmarks.harness.models._LARGE_TRANSFORMER"
    monkeypatch.setattr(module, small)
    folder = model_folder(LARGE, tmp_path)
    assert model_digest(LARGE) != unchanged
    assert find_model(folder).class_name == "FluxPipeline"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert model_folder(LARGE, tmp_path) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    # diffusers reads the same folder, with every weight in its place.
    from diffusers import FluxTransformer2DModel

    model, loading = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.config.num_attention_heads == 2
