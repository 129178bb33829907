"""Judges: handed in, asked for every picture, and never more than asked."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from painters import SIZE, Painter, picture_of

from max_diffusion import NoCacheConfig, RequestError
from max_diffusion.evaluation import Comparison, Judge, Target, Verdict, compare, tune
from max_diffusion.evaluation.comparison_report import summary_table

PROMPTS = ("a", "b", "c")


@dataclass(frozen=True)
class Opinion:
    """A verdict of another class than the demo model's."""

    is_right: bool
    reason: str


class Counting:
    """Knows what is drawn without an error; cannot tell of ``c`` where there is one."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, np.ndarray]] = []

    def __call__(self, prompt: str, frames: np.ndarray, /) -> Opinion | None:
        self.asked.append((prompt, frames))
        is_plain = np.array_equal(frames[0], picture_of(PROMPTS.index(prompt)))
        if prompt == "c" and not is_plain:
            return None
        return Opinion(is_plain, "" if is_plain else f"no {prompt}")


def paint(**options: Any) -> Comparison:
    pipeline: Any = Painter()
    return compare(pipeline, PROMPTS, ["auto"], runs=2, num_images=3, **options)


def test_a_judge_sees_each_image_of_a_run_once_and_its_words_are_kept() -> None:
    judge = Counting()
    checked: Judge = judge
    found = paint(judge=checked)
    assert len(judge.asked) == len(found.rows) * len(PROMPTS)
    for prompt, frames in judge.asked:
        assert frames.shape == (1, SIZE, SIZE, 3)
        assert frames.dtype == np.uint8
        index = PROMPTS.index(prompt)
        assert any(np.array_equal(frames, row.frames[index]) for row in found.rows)
    baseline, cached, fewer = found.rows
    assert [(s.is_right, s.why_not) for s in baseline.scores] == [(True, "")] * 3
    for row in (cached, fewer):
        assert [(s.is_right, s.why_not) for s in row.scores] == [
            *((False, "no a"), (False, "no b"), (None, "")),
        ]
    assert [(row.right, row.num_judged) for row in found.rows] == [
        *((3, 3), (0, 2), (0, 2)),
    ]
    assert found.num_judged == 3  # of "c" it can tell where there is no cache
    assert summary_table(found)["right"] == ["3 of 3", "0 of 2", "0 of 2"]
    assert [row["right"] for row in found.to_dict()["rows"]] == [3, 0, 0]


def test_without_a_judge_nothing_is_told() -> None:
    found = paint()
    assert found.num_judged == 0
    assert "right" not in summary_table(found)
    for row in found.rows:
        assert (row.right, row.num_judged) == (None, 0)
        assert all((s.is_right, s.why_not) == (None, "") for s in row.scores)


def test_a_judge_that_never_can_tell_is_as_none() -> None:
    found = paint(judge=lambda prompt, frames: None)
    assert (found.num_judged, found.rows[0].right) == (0, None)
    assert found.to_dict() == paint().to_dict()


def test_a_search_asks_of_what_it_validates_only() -> None:
    judge = Counting()
    asked: list[str] = []

    def told(prompt: str, frames: np.ndarray) -> Verdict | None:
        asked.append(prompt)
        return judge("a", frames)

    def behave(cache: Any, steps: int, prompt: str) -> tuple[float, float]:
        is_plain = isinstance(cache, NoCacheConfig)
        return steps / (10 if is_plain else 20), 0.0 if is_plain else 1.0

    pipeline: Any = Painter(behave, names=("auto",))
    result = tune(
        pipeline,
        Target(psnr=40.0),
        prompts=["x", "y"],
        validation_prompts=["u", "v"],
        judge=told,
        budget_seconds=60,
    )
    assert result.is_met  # the judge has no say in that
    assert set(asked) == {"u", "v"}
    rows = result.validation.rows
    assert [row.right for row in rows] == [0] * len(rows)
    assert result.validation.num_judged == 2


@pytest.mark.parametrize("judge", [5, "demo", Opinion(True, "")])
def test_what_cannot_be_asked_is_refused_before_drawing(judge: Any) -> None:
    painter: Any = Painter()
    message = "{}: expected a judge that is called with a prompt and frames, got "
    with pytest.raises(RequestError, match=message.format("compare")):
        compare(painter, "a", ["auto"], judge=judge)
    with pytest.raises(RequestError, match=message.format("tune")):
        tune(painter, Target(psnr=40.0), judge=judge)
    assert painter.drawn == []


@pytest.mark.parametrize("verdict", [True, "right", (True, "")])
def test_what_is_no_verdict_is_told(verdict: Any) -> None:
    message = (
        f"judge: expected a verdict with is_right and reason, or None, got {verdict!r} "
        "for 'a'"
    )
    painter: Any = Painter()
    with pytest.raises(RequestError, match=re.escape(message)):
        compare(painter, "a", [], runs=1, judge=lambda prompt, frames: verdict)


EVALUATION = Path(__file__).parents[2] / "max_diffusion" / "evaluation"
FILES = sorted(EVALUATION.glob("**/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_evaluation_knows_nothing_of_the_demo_model(path: Path) -> None:
    code = ast.unparse(_without_docstrings(ast.parse(path.read_text("utf-8"))))
    assert "import" in code
    assert "demo" not in code


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [
                part
                for part in node.body
                if not (
                    isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
                )
            ] or [ast.Pass()]
    return tree
