"""Routines that run together, over graphs of plain numpy."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from max.driver import CPU, Buffer

from max_diffusion.core.buffers import concatenate_rows
from max_diffusion.execution.batcher import Batcher, Lane
from max_diffusion.execution.graph_call import Fork, GraphCall, Routine, run
from max_diffusion.sampling import Schedule
from max_diffusion.sampling.euler import EulerState


class Graphs(Mapping[str, Any]):
    """Every graph adds its inputs up, and notes how many samples it was given."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int]] = []
        self.name = ""

    def __getitem__(self, name: str) -> Any:
        self.name = name
        return self

    def __iter__(self) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return 1

    def execute(self, *inputs: Buffer) -> list[Buffer]:
        arrays = [value.to_numpy() for value in inputs]
        self.runs.append((self.name, len(arrays[0])))
        if self.name == "fails" or np.isnan(arrays[0]).any():
            raise RuntimeError("graph failed")
        total = sum(arrays[1:], start=arrays[0])
        return [Buffer.from_numpy(total.copy()) for _ in range(2)]


def value(number: float, rows: int = 1, width: int = 3) -> Buffer:
    return Buffer.from_numpy(np.full((rows, width), number, np.float32))


def call(graph: str, *inputs: Any, **options: Any) -> GraphCall:
    return GraphCall(graph, inputs, CPU(), **options)


def chain(number: float, *graphs: str, rows: int = 1, passing: int = 0) -> Routine[Any]:
    """Graphs in a row, each with what the one before gave."""
    now = value(number, rows)
    for stage, graph in enumerate(graphs):
        outputs = yield call(graph, now, now, num_passing=passing, stage=stage)
        now = outputs[0]
    return now.to_numpy().tolist()


def test_equal_calls_are_one_and_everyone_gets_his_own() -> None:
    graphs = Graphs()
    lanes = Batcher(graphs, 8).run(
        [chain(n, "a", "b", rows=r) for n, r in ((1, 1), (2, 2), (5, 1))]
    )
    assert graphs.runs == [("a", 4), ("b", 4)]
    assert [lane.result for lane in lanes] == [
        [[4, 4, 4]],
        [[8, 8, 8]] * 2,
        [[20, 20, 20]],
    ]


def test_those_behind_go_first_so_that_they_meet() -> None:
    """One skips a graph, and waits where the others come."""

    def short() -> Routine[Any]:
        outputs = yield call("c", value(1), value(1), stage=2)
        return outputs[0].to_numpy().tolist()

    graphs = Graphs()
    Batcher(graphs, 8).run([chain(1, "a", "b", "c"), short(), chain(2, "a", "b", "c")])
    assert graphs.runs == [("a", 2), ("b", 2), ("c", 3)]


def test_other_sizes_and_shared_inputs_are_other_calls() -> None:
    def one(width: int, table: Buffer) -> Routine[Any]:
        yield call("a", value(1, width=width), table, shared=frozenset((1,)))

    graphs = Graphs()
    first, second = value(1), value(1)
    Batcher(graphs, 8).run(
        [one(3, first), one(3, second), one(3, first), one(1, first)]
    )
    assert sorted(graphs.runs) == [("a", 1), ("a", 1), ("a", 2)]


@pytest.mark.parametrize("passing", [0, 1], ids=["kept", "passing"])
def test_rows_are_put_together_once(
    passing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never where they came as a batch, whether they were copied or pass on."""
    made: list[int] = []
    module = "max_diffusion.execution.batcher.concatenate_rows"

    def counted(values: Any) -> Buffer:
        made.append(len(values))
        return concatenate_rows(values)

    monkeypatch.setattr(module, counted)
    graphs = Graphs()
    lanes = Batcher(graphs, 8).run(
        [chain(n, "a", "b", "c", passing=passing) for n in (1.0, 2.0)]
    )
    assert made == [2]  # the first graph reads the same rows twice
    assert [lane.result for lane in lanes] == [[[8] * 3], [[16] * 3]]


def test_rows_in_other_company_are_put_together_anew() -> None:
    """More batches than are remembered, in which the same rows come and go."""
    rng = np.random.default_rng(3)

    def wandering(number: float, stages: list[int]) -> Routine[Any]:
        now = value(number)
        for stage in stages:
            passing = int(rng.integers(2))
            outputs = yield call("a", now, now, num_passing=passing, stage=stage)
            now = outputs[0]
        return now.to_numpy().tolist()

    all_stages = [sorted(rng.choice(40, 20, replace=False)) for _ in range(6)]
    routines = [wandering(1 + n, stages) for n, stages in enumerate(all_stages)]
    lanes = Batcher(Graphs(), 4).run(routines)
    doubled = 2.0**20
    assert [x.result for x in lanes] == [[[(1 + n) * doubled] * 3] for n in range(6)]


def test_a_fork_leaves_nothing_for_the_garbage_collector() -> None:
    """Which would find its buffers late, and take its time."""
    gc.collect()
    gc.disable()
    try:
        lanes = Batcher(Graphs(), 8).run([forked((1, 2)), forked((3, 4))])
        left = [each for each in gc.get_objects() if type(each) is Lane]
    finally:
        gc.enable()
    assert len(left) == len(lanes)


def test_host_arrays_are_put_together() -> None:
    def one(number: float) -> Routine[Any]:
        array = np.full((1, 3), number, np.float32)
        outputs = yield call("a", value(1), array)
        return outputs[0].to_numpy().tolist()

    graphs = Graphs()
    lanes = Batcher(graphs, 8).run([one(1), one(2)])
    assert graphs.runs == [("a", 2)]
    assert [lane.result for lane in lanes] == [[[2] * 3], [[3] * 3]]


def test_a_step_of_one_and_a_preview_of_another_are_one() -> None:
    graphs = Graphs()
    sigmas = np.array([1, 0.25, 0], np.float32)
    state = EulerState(Schedule(sigmas, 1000 * sigmas[:-1]), 1, CPU())
    latents = Buffer.from_numpy(np.ones(1, np.float32))
    lanes = Batcher(graphs, 8).run(
        [state.step(latents, latents, 0, 0), state.preview(latents, latents, 0)]
    )
    assert graphs.runs == [("euler_step", 2)]
    assert [lane.result.to_numpy() for lane in lanes if lane.result is not None] == [
        1.25,
        1.75,
    ]


def forked(numbers: tuple[float, float], *, last: str = "b") -> Routine[Any]:
    results = yield Fork(tuple(chain(number, "a", last) for number in numbers))
    return results


def test_a_fork_runs_as_one_and_gives_results_in_order() -> None:
    graphs = Graphs()
    lanes = Batcher(graphs, 8).run([forked((1, 2)), chain(3, "a", "b")])
    assert graphs.runs == [("a", 3), ("b", 3)]
    assert lanes[0].result == [[[4] * 3], [[8] * 3]]
    alone = Graphs()
    assert run(alone, forked((1, 2))) == lanes[0].result
    assert alone.runs == [("a", 1), ("b", 1)] * 2


def test_a_part_that_fails_ends_its_fork_and_nothing_else() -> None:
    graphs = Graphs()
    lanes = Batcher(graphs, 8).run(
        [forked((float("nan"), 2)), forked((1, 2)), chain(3, "a", "b")]
    )
    assert isinstance(lanes[0].error, RuntimeError)
    assert lanes[1].result == [[[4] * 3], [[8] * 3]]
    assert lanes[2].result == [[12] * 3]
    # The batch, then one by one but for the sibling, then three that are left.
    assert graphs.runs[:5] == [("a", 5), ("a", 1), ("a", 1), ("a", 1), ("a", 1)]
    assert ("b", 3) in graphs.runs


def test_a_graph_that_always_fails_ends_all() -> None:
    lanes = Batcher(Graphs(), 8).run([forked((1, 2), last="fails") for _ in range(2)])
    assert all(isinstance(lane.error, RuntimeError) for lane in lanes)


def test_a_routine_that_raises_ends_alone() -> None:
    def bad() -> Routine[Any]:
        yield call("a", value(1), value(1))
        raise ZeroDivisionError

    lanes = Batcher(Graphs(), 8).run([bad(), chain(1, "a")])
    assert isinstance(lanes[0].error, ZeroDivisionError)
    assert lanes[1].result == [[2] * 3]


def test_constants_are_kept_while_the_same_go_together() -> None:
    from max_diffusion.execution import batcher as batching

    texts = value(1), value(2)

    def one(index: int) -> Routine[Any]:
        constant = frozenset((1,))
        outputs = yield call("a", value(0), texts[index], constant=constant)
        return outputs[0].to_numpy().tolist()

    batcher = batching.Batcher(Graphs(), 8)
    for _ in range(2):
        lanes = batcher.run([one(0), one(1)])
        assert [lane.result for lane in lanes] == [[[1] * 3], [[2] * 3]]
        assert len(batcher._rows._constants) == 1
    batcher.run([one(0)])
    assert not batcher._rows._constants  # nothing is held of who has left


class Overwriting(Graphs):
    """Writes to its last output again, as a pool of memory would."""

    def execute(self, *inputs: Buffer) -> list[Buffer]:
        self.last = inputs[0].to_numpy() * 2
        return [Buffer.from_numpy(self.last)]


@pytest.mark.parametrize(
    ("width", "passing", "is_own"),
    [(16, 0, [True, True]), (16, 1, [False, False]), (3, 1, [False, True])],
    ids=["kept", "passing", "passing-unaligned"],
)
def test_what_is_kept_or_not_aligned_has_memory_of_its_own(
    width: int, passing: int, is_own: list[bool]
) -> None:
    outputs: list[Buffer] = []

    def one() -> Routine[None]:
        outputs.extend((yield call("a", value(1, width=width), num_passing=passing)))

    graphs = Overwriting()
    Batcher(graphs, 8).run([one(), one()])
    graphs.last[:] = -1
    assert [bool((x.to_numpy() == 2).all()) for x in outputs] == is_own


def test_a_part_does_not_go_on_after_its_sibling_has_failed() -> None:
    went_on: list[bool] = []

    def bad() -> Routine[Any]:
        yield call("a", value(1), value(1))
        raise ZeroDivisionError

    def good() -> Routine[Any]:
        yield call("a", value(1), value(1))
        went_on.append(True)

    def both() -> Routine[Any]:
        return (yield Fork((bad(), good())))

    lanes = Batcher(Graphs(), 8).run([both()])
    assert isinstance(lanes[0].error, ZeroDivisionError)
    assert went_on == []
