"""The run report: what it counts, and that every program can read it."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from reports import make_report, make_step

from max_diffusion.core.report import RunReport, StepRecord


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
    assert set(plain) == names - {"options"} | {"full_passes", "total_passes"}
    own = make_report((), options={"strength": 0.5}).to_dict()
    assert own["strength"] == 0.5
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
