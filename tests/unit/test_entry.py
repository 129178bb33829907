"""The command line before anything of it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import run_python

COMMAND = str(Path(sys.executable).with_name("max-diffusion"))
ENTER = "from max_diffusion.cli.entry import main; main()"


def test_ctrl_c_within_an_import_is_no_traceback() -> None:
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
class Interrupting:
    def find_spec(self, name, *rest):
        if name == "argparse":
            os.kill(os.getpid(), signal.SIGINT)
            print("import went on", file=sys.stderr)
sys.meta_path.insert(0, Interrupting())
sys.modules.pop("argparse", None)
{ENTER}
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_told_to_ignore_ctrl_c_still_does_so_while_importing() -> None:
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
class Interrupting:
    def find_spec(self, name, *rest):
        if name == "argparse":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.modules.pop("argparse", None)
sys.argv[1:] = ["--version"]
{ENTER}
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.1.0\n", "")


@pytest.mark.parametrize("name", ["graphs.py", "max.py", "numpy.py", "random.py"])
def test_a_users_own_files_beside_him_are_not_imported(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("raise SystemExit('imported')")
    done = processes.run(
        sys.executable, "-c", ENTER, "inspect", "--json", cwd=tmp_path
    )  # imports all of them
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("{")


def run_with_path(*command: object, **options: Any) -> Any:
    environment = dict(os.environ) | {"PYTHONPATH": str(options["cwd"])}
    return subprocess.run(
        list(map(str, command)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_other_graphs_in_pythonpath_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "__init__.py").touch()
    done = run_with_path(COMMAND, "inspect", cwd=tmp_path)
    own = Path(__file__).parents[2] / "graphs"
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"error: graphs: expected {own}, got {tmp_path}/graphs/__init__.py; rename "
        "that one, or take its folder out of PYTHONPATH\n",
    )


@pytest.mark.parametrize("name", ["graphs.py", "graphs/weights.py", "max.py"])
def test_a_scripts_neighbour_of_our_name_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    script = tmp_path / "script.py"
    script.write_text("from max_diffusion import load_pipeline")
    done = processes.run(sys.executable, script)
    last = done.stderr.splitlines()[-1]
    top = name.partition("/")[0].removesuffix(".py")
    where = tmp_path / top if name == "graphs/weights.py" else tmp_path / name
    assert last == (
        f"ImportError: max_diffusion: expected its own package {top!r}, got {where}; "
        "rename that one, or take its folder out of sys.path"
    )


@pytest.mark.parametrize("name", ["graphs.py", "max.py"])
def test_a_scripts_neighbour_of_our_name_is_not_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("print('run'); raise RuntimeError('its own')")
    code = "from max_diffusion import load_pipeline"
    done = processes.run(sys.executable, "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: max_diffusion: expected its own package "
        f"{name.removesuffix('.py')!r}, got {tmp_path / name}; rename that one, or "
        "take its folder out of sys.path"
    )


def test_a_working_directory_that_is_gone_is_no_traceback(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os, sys; os.rmdir({str(gone)!r}); sys.argv[1:]=['generate','a']\n"
    done = processes.run(sys.executable, "-c", code + ENTER, cwd=gone)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
