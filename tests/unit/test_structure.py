"""What is public, and what importing costs."""

from __future__ import annotations

import ast
import importlib

import pytest
from import_walker import FILES
from processes import run_python

import max_diffusion


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


def test_no_file_and_no_class_is_too_long() -> None:
    """What grows beyond is several things, and wants to be taken apart."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
                methods = [item for item in node.body if isinstance(item, kinds)]
                assert len(methods) <= 20, f"{path}: {node.name}"
