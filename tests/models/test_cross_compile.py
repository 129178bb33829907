"""GPU graphs compile for an H100, without one."""

from __future__ import annotations

import sys
from pathlib import Path

import cross_compile
import processes
import pytest
from folders import make_uniform_folder

# Each distinct matrix product costs MAX 20 s of one core on this target, so whole
# components take from minutes to half an hour: `scripts/test -m slow`.
PARTS = [
    "build",
    "step",
    "layers",
    *(
        pytest.param(part, marks=pytest.mark.slow)
        for part in (
            "vae",
            "text_encoder",
            "text_encoder_2",
            "transformer:full",
            "transformer:blocks",
            "transformer:attention",
            "transformer:modules",
        )
    ),
]


@pytest.fixture(scope="module")
def uniform_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_uniform_folder(tmp_path_factory.mktemp("uniform"))


@pytest.mark.parametrize("part", PARTS)
def test_part_compiles_for_sm_90(uniform_folder: Path, part: str) -> None:
    script = cross_compile.__file__
    done = processes.run(sys.executable, script, uniform_folder, part)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
