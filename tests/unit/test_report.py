"""The run report: what it counts, and that every program can read it."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from max_diffusion.core.report import RunReport, StepRecord


def make_step(step: int = 0, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "branch": "conditional",
        "sigma": 1 - step / 10,
        "timestep": 1000 - step * 100,
        "actions": ("compute",),
        "signal": None,
        "milliseconds": 10.0,
    }
    return StepRecord(**values | changes)


def make_report(steps: tuple[StepRecord, ...] = (), **changes: Any) -> RunReport:
    values: dict[str, Any] = {
        "model": "demo",
        "device": "cpu",
        "dtype": "float32",
        "prompts": ("a red circle",),
        "negative_prompt": None,
        "height": 128,
        "width": 96,
        "num_inference_steps": max((s.step + 1 for s in steps), default=1),
        "guidance_scale": 3.5,
        "true_cfg_scale": 1.0,
        "seed": 7,
        "num_images": 1,
        "image_tokens": 64,
        "text_tokens": 32,
        "cache": {"name": "none"},
        "steps": steps,
        "cache_bytes": 0,
        "load_seconds": 0.1,
        "compile_seconds": 0.2,
        "compile_count": 1,
        "encode_seconds": 0.3,
        "denoise_seconds": 0.4,
        "decode_seconds": 0.5,
        "total_seconds": 1.2,
        "warnings": (),
        "versions": {"max-diffusion": "0.1.0"},
    }
    return RunReport(**values | changes)


def test_report_counts_passes_per_sample_and_branch() -> None:
    report = make_report(
        (
            make_step(0, actions=("compute", "compute", "compute")),
            make_step(0, branch="unconditional", actions=("compute",) * 3),
            make_step(1, actions=("compute", "predict", "reuse")),
            make_step(1, branch="unconditional", actions=("reuse",) * 3),
        )
    )
    assert report.total_passes == 12
    assert report.full_passes == 7


def test_a_steps_time_is_the_sum_of_its_branches_unless_they_ran_as_one() -> None:
    other = "unconditional"
    report = make_report(
        (
            make_step(0, milliseconds=2.0),
            make_step(0, milliseconds=3.0, branch=other),
            make_step(1, milliseconds=4.0, is_time_shared=True),
            make_step(1, milliseconds=4.0, is_time_shared=True, branch=other),
            make_step(2, milliseconds=None),
            make_step(2, milliseconds=None, branch=other),
        )
    )
    assert report.step_milliseconds == {0: 5.0, 1: 4.0}
    plain = json.loads(json.dumps(report.to_dict()))["steps"]
    assert [step["milliseconds"] for step in plain] == [2, 3, 4, 4, None, None]
    assert [step["is_time_shared"] for step in plain[1:4]] == [False, True, True]


def test_every_field_of_a_step_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    for item in fields(StepRecord):
        assert any(f"`{item.name}`" in row for row in rows), item.name


def test_report_without_steps_counts_nothing() -> None:
    assert (make_report().full_passes, make_report().total_passes) == (0, 0)


def test_to_dict_has_every_field_and_the_counts() -> None:
    plain = make_report((make_step(),)).to_dict()
    names = {item.name for item in fields(RunReport)}
    assert set(plain) == names | {"full_passes", "total_passes"}
    assert set(plain["steps"][0]) == {item.name for item in fields(StepRecord)}
    assert plain["prompts"] == ["a red circle"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_to_dict_writes_what_is_not_finite_as_null(value: float) -> None:
    report = make_report(
        (make_step(signal=(0.5, value)),), cache={"name": "x", "threshold": value}
    )
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["steps"][0]["signal"] == [0.5, None]
    assert plain["cache"] == {"name": "x", "threshold": None}


def test_to_dict_takes_numpy_numbers_and_read_only_mappings() -> None:
    report = make_report(
        (make_step(sigma=np.float32(0.25), signal=(np.float32("nan"),)),),
        seed=np.int64(2**40),
        cache=MappingProxyType({"name": "x", "is_on": True, "order": np.int32(2)}),
    )
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["steps"][0]["sigma"] == 0.25
    assert plain["steps"][0]["signal"] == [None]
    assert plain["seed"] == 2**40
    assert plain["cache"] == {"name": "x", "is_on": True, "order": 2}


def test_report_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        make_report().seed = 1  # type: ignore[misc]
