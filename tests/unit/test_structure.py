"""What may import what, what is public, and what importing costs."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from processes import run_python

import max_diffusion

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for folder in ("graphs", "max_diffusion")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Absolute names of a file's imports, relative ones resolved.

    Without ``everywhere``, those inside functions and ``TYPE_CHECKING`` are left out.
    """
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def reaches(names: set[str], *prefixes: str) -> set[str]:
    return {n for n in names if any(n == p or n.startswith(p + ".") for p in prefixes)}


def test_there_are_files_to_walk() -> None:
    assert len(FILES) > 25


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    names = imports(path, everywhere=True)
    part = path.relative_to(ROOT)
    heavy = ["torch", "diffusers", "transformers", "max.pipelines", "max.experimental"]
    if part.parts[1] == "max_serve":  # is there for it
        heavy.remove("max.pipelines")
    assert not reaches(names, *heavy)
    if part.parts[0] == "graphs":
        assert not reaches(names, "max_diffusion", "max.engine", "max.driver")
    if part.parts[1] in ("caches", "schedulers", "checkpoint"):
        upper = ("models", "pipeline", "registry", "text_to_image", "cli")
        assert not reaches(names, *(f"max_diffusion.{name}" for name in upper))
    if part.parts[1] != "compile.py" and part.name != "taylorseer.py":
        assert (
            "max.engine.InferenceSession" not in imports(path, everywhere=False)
            or part.name in ("pipeline.py", "architecture.py")  # to hand it on
        )


def test_public_names_exist() -> None:
    assert len({*max_diffusion.__all__}) == len(max_diffusion.__all__)
    for name in max_diffusion.__all__:
        assert getattr(max_diffusion, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("max_diffusion").nothing  # noqa: B018


def test_using_the_package_imports_no_torch() -> None:
    code = "import sys, max_diffusion; max_diffusion.load_pipeline; print(*sys.modules)"
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = done.stdout.split()
    assert "max.engine" in loaded
    for name in ("torch", "transformers", "diffusers", "max.pipelines"):
        assert name not in loaded


def test_graphs_for_a_cpu_build_no_extension_of_max() -> None:
    """``max.nn`` does when it is first imported, into a folder that may be closed."""
    code = "import sys, graphs.flux1, graphs.t5; print('max.nn' in sys.modules)"
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
