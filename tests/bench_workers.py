"""Stand-ins for the processes that a benchmark measures."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.runtimes import Runtime

WORKER = """
import json, sys
job = json.loads(sys.argv[1])
assert "{broken}" not in json.dumps(job), "a defect"
case = {{"picture_ms": 100.0, "full_step_ms": 2.0, "cached_step_ms": 0.5,
         "full_steps": 17}}
print("noise that a runtime prints")
print(json.dumps({{
    "versions": {{"thing": "1.0"}},
    "ready_seconds": 1.0,
    "first_picture_seconds": 2.0,
    "peak_mib": 300.0,
    "cases": {{
        name: {{"error": "no such cache"}} if name == "pab" else case
        for name in job["cases"]
    }},
}}))
"""
# Tells a file beside it what it was asked to do.
TELLING = """
import os, pathlib
told = pathlib.Path(__file__).with_name("told.jsonl")
kept = {name: os.environ.get(name) for name in (
    "MODULAR_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
with told.open("a") as file:
    print(json.dumps({**job, "variables": kept}), file=file)
"""
STAGES = 'print(\'noise\\n{"stages": {"imports": 0.01, "draw": 0.02}}\')'
PARTS = 'print(\'{"update": 1.0, "predict": 2.0}\')'


def ours(**options: Any) -> Runtime:
    return Runtime("max_diffusion", "draw_ours.py", "float32", **options)
