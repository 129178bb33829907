"""The command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from max_diffusion.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs a command in an empty folder: exit code, standard output and errors."""
    monkeypatch.chdir(tmp_path)

    def run_command(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(map(str, words)))
        code = end.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run_command


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(*args: object) -> None:
        raise AssertionError("a graph was compiled")

    monkeypatch.setattr("max_diffusion.execution.compiler.CompiledGraphs.add", add)
