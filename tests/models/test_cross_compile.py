"""Every GPU graph compiles for an H100, without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import processes

# Virtual devices must be set before MAX makes any device, hence a process of its own.
_COMPILE = """
import json, sys
from max.driver import (
    set_virtual_device_api, set_virtual_device_count, set_virtual_device_target_arch
)
set_virtual_device_api("cuda")
set_virtual_device_target_arch("sm_90")
set_virtual_device_count(1)
from max_diffusion import load_pipeline
pipeline = load_pipeline(sys.argv[1], device="gpu", dtype="bfloat16")
print(json.dumps(sorted(pipeline.models)))
"""


def test_all_graphs_compile_for_sm_90(flux_folder: Path) -> None:
    done = processes.run(sys.executable, "-c", _COMPILE, flux_folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        "back",
        "decode",
        "euler_step",
        "front",
        "full",
        "guidance",
        "reuse",
        "taylorseer_predict_1",
        "taylorseer_predict_2",
        "taylorseer_update_1",
        "taylorseer_update_2",
        "text_encoder",
        "text_encoder_2",
    ]
