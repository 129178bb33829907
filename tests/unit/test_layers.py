"""Import direction: ``cli -> pipelines -> components, caches -> graphs``."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from import_walker import FILES, ROOT, imported, is_in, name_of

PACKAGE_FILES = [path for path in FILES if path.name != "__init__.py"]

# Lowest first; a part imports its own layer and those below. A new part needs a place.
LAYERS = (
    {"errors"},
    {"core", "demo"},
    {"execution", "checkpoint"},
    {"caches", "components", "sampling"},
    {"denoising", "media", "decorator"},
    {"pipelines"},
    {"models"},  # which pipelines import when a folder needs them, by name
    {"engine", "evaluation", "plugins"},
    {"serving", "exporting"},
    {"cli"},
    {"__main__"},
)


def layer(name: str) -> int:
    part = name.split(".")[1]
    places = [index for index, parts in enumerate(LAYERS) if part in parts]
    assert places, f"{part} has no place in LAYERS; give it one"
    return places[0]


def test_walk_finds_what_it_should() -> None:
    names = set(imported(ROOT / "max_diffusion/cli/generate.py"))
    assert len(FILES) > 30
    assert "max_diffusion.pipelines.opening" in names  # inside a function
    assert "max_diffusion.errors" in names
    # For the type checker only.
    assert "max_diffusion.pipelines.text_to_image" not in names
    assert "max_diffusion.pipelines.outputs" in set(
        imported(ROOT / "max_diffusion/cli/generate.py", when_typing=True)
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_a_training_library_or_max_pipelines(path: Path) -> None:
    refused = ["torch", "transformers", "diffusers", "ray"]
    refused += ["max.pipelines", "max.experimental"]
    # Each is there for one of them.
    for part, package in (
        ("serving.max_serve", "max.pipelines"),
        ("serving.ray_serve", "ray"),
    ):
        if is_in(name_of(path), f"max_diffusion.{part}"):
            refused.remove(package)
    found = [n for n in imported(path, when_typing=True) if is_in(n, *refused)]
    assert found == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if name_of(p).startswith("graphs")], ids=name_of
)
def test_graphs_import_only_max_graph_and_themselves(path: Path) -> None:
    allowed = ("max.graph", "max.dtype", "max.nn", "numpy", "graphs")
    found = [
        name
        for name in imported(path, when_typing=True)
        if not is_in(name, *allowed)
        and name.split(".")[0] not in sys.stdlib_module_names
    ]
    assert found == []


@pytest.mark.parametrize(
    "path", [p for p in PACKAGE_FILES if "max_diffusion" in name_of(p)], ids=name_of
)
def test_max_diffusion_imports_point_downwards(path: Path) -> None:
    own = layer(name_of(path))
    found = [
        name
        for name in imported(path)
        if is_in(name, "max_diffusion")
        and name not in ("max_diffusion", "max_diffusion.__version__")
        and layer(name) > own
    ]
    assert found == []


@pytest.mark.parametrize("package", ["caches", "sampling", "checkpoint", "components"])
def test_caches_samplers_and_components_know_no_model(package: str) -> None:
    upper = ("models", "pipelines", "cli", "denoising")
    files = sorted((ROOT / "max_diffusion" / package).glob("**/*.py"))
    assert files
    for path in files:
        names = set(imported(path, when_typing=True))
        assert not [
            n for n in names if is_in(n, *(f"max_diffusion.{u}" for u in upper))
        ]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_compile_opens_a_session(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] == "InferenceSession"
        and ast.unparse(node.func) != "onnxruntime.InferenceSession"
    ]
    is_compiler = name_of(path) == "max_diffusion.execution.compiler"
    assert len(calls) == (1 if is_compiler else 0)
