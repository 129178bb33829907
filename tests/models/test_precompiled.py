"""Compiled graphs that ship, that are given, and that may not be used."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, Module, TensorType
from processes import run

from max_diffusion import CompileError, RequestError, open_model
from max_diffusion.core.buffers import to_numpy
from max_diffusion.execution import artefacts, graph_library, targets
from max_diffusion.execution.artefacts import (
    Artefact,
    ArtefactError,
    Manifest,
    artefacts_in,
    compiler_versions,
    hash_of,
    write_artefact,
)
from max_diffusion.execution.compiler import CompiledGraphs, compiled_module
from max_diffusion.execution.graph_library import GraphLibrary, shipped_graphs
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.execution.recipe import subject_of
from max_diffusion.execution.targets import HOSTS, host_targets
from max_diffusion.exporting.job import manifest_of

SUBJECT = subject_of(GraphModule, "a test's")
OWN = host_targets()[0].name


def tripled(factor: float = 3.0) -> GraphModule:
    """A module of one graph."""

    def build(module: Module) -> None:
        kind = TensorType(DType.float32, ("n",), DeviceRef.CPU())
        with Graph("tripled", input_types=[kind], module=module) as graph:
            [value] = graph.inputs
            graph.output(value.tensor * factor + value.tensor)

    return GraphModule("tripled", build, SUBJECT)


def answer(graphs: CompiledGraphs) -> list[float]:
    given = Buffer.from_numpy(np.arange(3, dtype=np.float32))
    return to_numpy(graphs.models["tripled"].execute(given)[0]).tolist()


@pytest.fixture(scope="module")
def mef(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mef") / "module.mef"
    compiled_module(InferenceSession(devices=[CPU()]), tripled()).export_mef(path)
    return path.read_bytes()


@pytest.fixture
def folder(mef: bytes, tmp_path: Path) -> Path:
    """A folder that holds the module for this machine."""
    write_artefact(tmp_path, manifest_of(tripled(), OWN), mef)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_ships(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graph_library, "shipped_graphs", lambda: tmp_path / "nothing")


def loaded(
    folder: Path, module: GraphModule | None = None, *, is_required: bool = False
) -> CompiledGraphs:
    library = GraphLibrary(CPU(), [folder], is_required=is_required)
    graphs = CompiledGraphs(InferenceSession(devices=[CPU()]), CPU(), library)
    graphs.add([module or tripled()], dict)
    return graphs


def the_artefact(folder: Path) -> Artefact:
    [found] = artefacts_in(folder / OWN, "tripled")
    return found


def rewritten(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    found = the_artefact(folder)
    (found.folder / f"{found.manifest.stem}.json").unlink()
    artefacts.write_manifest(replace(found, manifest=change(found.manifest)))


def test_given_graphs_are_run_and_nothing_is_compiled(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = loaded(folder, is_required=True)
    assert graphs.compile_count == 0
    assert answer(graphs) == [0.0, 4.0, 8.0]
    assert caplog.records == []


def flipped(folder: Path) -> None:
    path = the_artefact(folder).path
    bits = bytearray(path.read_bytes())
    bits[len(bits) // 2] ^= 4
    path.write_bytes(bits)


def cut(folder: Path) -> None:
    path = the_artefact(folder).path
    path.write_bytes(path.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    the_artefact(folder).path.write_bytes(b"")


def lost(folder: Path) -> None:
    the_artefact(folder).path.unlink()


def without_manifest(folder: Path) -> None:
    found = the_artefact(folder)
    (found.folder / f"{found.manifest.stem}.json").unlink()


def changed_manifest(folder: Path) -> None:
    found = the_artefact(folder)
    path = found.folder / f"{found.manifest.stem}.json"
    path.write_text(path.read_text().replace('"graphs": ["', '"graphs": ["un'))


def no_json(folder: Path) -> None:
    found = the_artefact(folder)
    (found.folder / f"{found.manifest.stem}.json").write_bytes(b"\xff\x00[")


def other_version(folder: Path) -> None:
    old = {"max-core": "26.6.0", "mojo-compiler": "1.1.0"}
    rewritten(folder, lambda m: replace(m, versions=old, key="0" * 64))


def other_graph(folder: Path) -> None:
    rewritten(folder, lambda m: replace(m, key="0" * 64))


def other_names(folder: Path) -> None:
    rewritten(folder, lambda m: replace(m, graphs=("doubled",)))


def other_machine(folder: Path) -> None:
    name = next(name for name, host in HOSTS.items() if host not in host_targets())
    rewritten(folder, lambda m: replace(m, target=name))
    (folder / OWN).rename(folder / name)


def in_the_wrong_folder(folder: Path) -> None:
    """As if somebody had renamed it."""
    name = next(name for name, host in HOSTS.items() if host not in host_targets())
    rewritten(folder, lambda m: replace(m, target=name))


def of_nothing(folder: Path) -> None:
    shutil.rmtree(folder / OWN)


def nested(folder: Path) -> None:
    found = the_artefact(folder)
    (found.folder / f"{found.manifest.stem}.json").write_text("[" * 200_000)


def no_file(folder: Path) -> None:
    found = the_artefact(folder)
    path = found.folder / f"{found.manifest.stem}.json"
    path.unlink()
    os.mkfifo(path)


def renamed(folder: Path) -> None:
    found = the_artefact(folder)
    for path in list(found.folder.iterdir()):
        suffix = ".json" if path.suffix == ".json" else ".mef.xz"
        path.rename(path.with_name("tripled-0" + suffix))


WORDS: dict[Callable[[Path], None], str] = {
    flipped: r"is damaged \(its sha256 is another\)",
    cut: r"is damaged \(its sha256 is another\)",
    emptied: r"is damaged \(its sha256 is another\)",
    lost: r"cannot be read \(No such file or directory\)",
    without_manifest: "has no manifest beside it",
    changed_manifest: "the manifest is damaged, or of another release",
    no_json: r"cannot be read \(it is no text\)",
    other_version: "they are of max-core 26.6.0, mojo-compiler 1.1.0, not max-core",
    other_graph: "the graphs have been changed since",
    other_names: "holds other graphs",
    other_machine: f"they are for .*, and this machine is {OWN}",
    in_the_wrong_folder: f"is for .*, not for {OWN}",
    nested: "the manifest is damaged",
    no_file: r"\.json is no file",
    renamed: r"it was tripled-.*\.json; name it so",
    of_nothing: "has none of this model, dtype and device",
}


@pytest.mark.parametrize("damage", WORDS, ids=lambda damage: damage.__name__)
def test_where_there_is_doubt_it_is_compiled_and_a_line_says_why(
    folder: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder)
    with caplog.at_level(logging.WARNING):
        graphs = loaded(folder)
    assert graphs.compile_count == 1
    assert answer(graphs) == [0.0, 4.0, 8.0]
    [record] = caplog.records
    line = record.getMessage()
    assert "\n" not in line
    assert line.startswith("precompiled graphs: tripled: ")
    assert line.endswith("; it is compiled here")
    assert re.search(WORDS[damage], line), line


@pytest.mark.parametrize("damage", WORDS, ids=lambda damage: damage.__name__)
def test_where_they_are_required_it_ends_at_once(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    damage(folder)
    with pytest.raises(CompileError, match=WORDS[damage]) as caught:
        loaded(folder, is_required=True)
    assert "\n" not in str(caught.value)
    assert "write them with max-diffusion compile" in str(caught.value)


def test_a_processor_in_doubt_compiles(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(targets, "_numpy_features", frozenset)
    assert loaded(folder).compile_count == 1
    assert f"they are for {OWN}, and this machine is none of" in caplog.text


def test_what_debugging_changes_is_compiled(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    debug = InferenceSession.debug
    debug.nan_check = True
    try:
        assert GraphLibrary(CPU(), [folder]).find(tripled()) == []
    finally:
        debug.nan_check = False
    assert "tripled: MAX's debugging has nan_check set; it is compiled" in caplog.text
    assert len(GraphLibrary(CPU(), [folder]).find(tripled())) == 1


def test_the_environment_sets_debugging_too(folder: Path) -> None:
    code = (
        "from max_diffusion.execution.graph_library import _debugging;"
        "print(*_debugging())"
    )
    for text, expected in (("nan-check", "nan_check\n"), ("", "\n")):
        environment = {**os.environ, "MODULAR_DEBUG": text}
        done = run(sys.executable, "-c", code, env=environment)
        assert (done.returncode, done.stdout) == (0, expected)


def test_another_literal_is_another_graph(folder: Path) -> None:
    graphs = loaded(folder, tripled(4.0))
    assert graphs.compile_count == 1
    assert answer(graphs) == [0.0, 5.0, 10.0]


def test_another_copy_is_used_where_one_is_damaged(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    mef: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = tmp_path_factory.mktemp("other")
    good = write_artefact(other, manifest_of(tripled(), OWN), mef)
    flipped(folder)
    library = GraphLibrary(CPU(), [folder, other], is_required=True)
    graphs = CompiledGraphs(InferenceSession(devices=[CPU()]), CPU(), library)
    graphs.add([tripled()], dict)
    assert (graphs.compile_count, answer(graphs)) == (0, [0.0, 4.0, 8.0])
    [record] = caplog.records
    line = record.getMessage()
    assert line.endswith(f"(its sha256 is another); {good.path} is used instead")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "is no folder; write one with"),
        ("", "'' is no folder"),
        ("a" * 5000, r"cannot be read \(File name too long\)"),
    ],
)
def test_a_folder_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"precompiled: .*{message}"):
        GraphLibrary(CPU(), [name])


def test_the_folder_of_one_target_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="is a target's folder; give the one above"):
        GraphLibrary(CPU(), [folder / OWN])


@pytest.mark.parametrize(
    "given", [None, 3, True, "x", Path("x"), [None], [["x"]], [b"x"], {"x": 1}]
)
def test_what_is_no_list_of_folders_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match=r"precompiled: expected a \w+"):
        open_model("demo", device="cpu", precompiled=given)


@pytest.mark.parametrize("given", ["no", "0", None, 2, 1])
def test_what_is_no_flag_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="require_precompiled: expected True or"):
        open_model("demo", device="cpu", require_precompiled=given)


def test_a_manifest_is_read_as_it_was_written(folder: Path) -> None:
    manifest = the_artefact(folder).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.versions == compiler_versions()
    for text in ("", "[]", "{}", "7", manifest.to_json().replace("tripled", "x", 1)):
        with pytest.raises(ArtefactError, match="manifest is damaged"):
            Manifest.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("graphs", 5),
        ("graphs", [5]),
        ("key", None),
        ("sha256", 7),
        ("recipe", 7),
        ("versions", None),
        ("needs", {"prefix": "", "tensors": [], "slots": []}),
    ],
)
def test_a_whole_manifest_with_other_kinds_of_values_is_refused(
    name: str, value: Any
) -> None:
    text = next(shipped_graphs().glob("*/sampler-*.json")).read_text(encoding="utf-8")
    values = json.loads(text)
    del values["manifest_sha256"]
    values[name] = value
    whole = json.dumps({"manifest_sha256": hash_of(values), **values})
    with pytest.raises(ArtefactError, match="the manifest is of another release"):
        Manifest.from_json(whole)


def test_a_key_does_not_depend_on_how_often_it_was_printed() -> None:
    module = tripled()
    again = str(module.module.mlir_module), str(module.module.mlir_module)
    assert again[0]
    assert module.key == tripled().key != tripled(4.0).key


def test_a_target_s_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not stop every user, so that they are imitated."""

    def refused(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    problems: list[str] = []
    assert artefacts_in(tmp_path / "missing", "vae", problems) == []
    assert problems == []
    monkeypatch.setattr("max_diffusion.execution.artefacts.os.listdir", refused)
    assert artefacts_in(tmp_path, "vae", problems) == []
    assert problems == [f"{tmp_path} cannot be read (Permission denied)"]
