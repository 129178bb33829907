"""What the project declares agrees with itself and with what it imports."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from import_walker import FILES, imported
from processes import run_python

import max_diffusion

ROOT = Path(__file__).parents[2]
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
    "skimage": "scikit-image",
    "google": "protobuf",
    "max": "modular",
    "mojo": "modular",
}
# Extras of what the package can do beside its main purpose.
OPTIONAL = ("evaluation", "lpips", "ray")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pixi() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pixi.toml").read_text(encoding="utf-8"))


def pins(requirements: list[str]) -> dict[str, str]:
    """Name to version specifier."""
    found = {}
    for requirement in requirements:
        match = re.fullmatch(r"([\w-]+)(.*)", requirement)
        assert match, requirement
        found[match[1]] = match[2]
    return found


def test_pixi_pins_are_those_of_pyproject(
    project: dict[str, Any], pixi: dict[str, Any]
) -> None:
    base = pins(project["project"]["dependencies"])
    extra = pins(project["project"]["optional-dependencies"]["test"])
    own = pixi["pypi-dependencies"]
    test = pixi["feature"]["test"]["pypi-dependencies"]
    assert own["modular"] == base["modular"] == "==26.7.0"
    shared = {
        name: pin if isinstance(pin, str) else f"[{pin['extras'][0]}]{pin['version']}"
        for name, pin in test.items()
        if name != "max-diffusion"
    }
    assert shared == extra
    for name in OPTIONAL:
        optional = pins(project["project"]["optional-dependencies"][name])
        assert optional.items() <= extra.items()
    assert pixi["dependencies"]["python"] == project["project"]["requires-python"]


def test_training_pins_are_the_tests_pins(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    test, train = pins(extras["test"]), pins(extras["train"])
    assert train == {"torch": "==2.13.*", "diffusers": "==0.42.*"}
    assert train.items() <= test.items()


def test_pixi_tasks_are_the_scripts(pixi: dict[str, Any]) -> None:
    tasks = {*pixi["tasks"], *pixi["feature"]["test"]["tasks"]}
    assert tasks == {"generate", "test", "check", "bench", "gpu_check"}
    for name in tasks:
        script = ROOT / "scripts" / name
        assert script.stat().st_mode & 0o111, f"{script} must be executable"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_import_is_a_declared_dependency(project: dict[str, Any]) -> None:
    declared = pins(project["project"]["dependencies"])
    for name in OPTIONAL:
        declared |= pins(project["project"]["optional-dependencies"][name])
    roots = {name.split(".")[0] for path in FILES for name in imported(path)}
    roots -= {*sys.stdlib_module_names, "graphs", "max_diffusion"}
    used = {DISTRIBUTIONS.get(root, root) for root in roots}
    assert used == set(declared)


def test_version_is_written_once_and_in_the_changelog(
    project: dict[str, Any], pixi: dict[str, Any]
) -> None:
    assert "version" not in project["project"]
    assert "version" not in pixi["workspace"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "max_diffusion.__version__"
    }
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest
    assert newest[1] == max_diffusion.__version__


def test_what_only_measures_the_project_is_not_in_the_wheel(
    project: dict[str, Any],
) -> None:
    from setuptools import find_packages

    settings = project["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    assert {"max_diffusion", "max_diffusion.evaluation", "graphs"} <= set(found)
    assert {name.split(".")[0] for name in found} == {"max_diffusion", "graphs"}
    assert not [name for name in found if "bench" in name]
    data = [item for items in settings["package-data"].values() for item in items]
    assert not [name for name in data if "bench" in name or "workers" in name]
    checked = project["tool"]["mypy"]["files"]
    assert {"benchmarks/gpu", "benchmarks/harness"} <= {*checked}


def test_license_is_apache_in_full(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_import_of_the_package_loads_nothing_heavy() -> None:
    code = "import sys, max_diffusion; print(*sys.modules)"
    done = run_python(code)
    loaded = set(done.stdout.split())
    assert "max_diffusion" in loaded
    heavy = {"torch", "transformers", "diffusers", "max.pipelines", "max.engine"}
    assert not loaded & (heavy | {"max.graph", "numpy", "rich", "PIL"})


def test_import_of_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, max_diffusion.cli.main; print(*sys.modules)"
    done = run_python(code)
    loaded = set(done.stdout.split())
    assert "max_diffusion.cli.main" in loaded
    assert not loaded & {"max.engine", "max.graph", "numpy", "rich", "PIL", "torch"}
