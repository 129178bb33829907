"""Routines of several requests run together: equal graph calls become one."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

from max.driver import Buffer

from ..buffers import concatenate_rows, copied, num_bytes, row_slice
from ..calls import GraphCall, Routine

if TYPE_CHECKING:
    from max.engine import Model

T = TypeVar("T")
_MAX_BATCHES: Final = 8
_ALIGNMENT: Final = 64


@dataclass
class Lane(Generic[T]):
    """One routine among those that run together."""

    routine: Routine[T]
    call: GraphCall | None = None
    """What it waits for; ``None`` at its end."""
    rows: int = 0
    """Samples of the call."""
    result: T | None = None
    error: Exception | None = None

    def resume(self, outputs: Sequence[Buffer] | None) -> None:
        """Runs the routine to its next call, or its end."""
        try:
            # send(None) is what starts a generator
            self.call = self.routine.send(outputs)  # type: ignore[arg-type]
            inputs, shared = self.call.inputs, self.call.shared
            place = 0
            while place in shared:
                place += 1
            self.rows = int(inputs[place].shape[0])
        except StopIteration as stop:
            self.call, self.result = None, stop.value
        except Exception as err:
            self.call, self.error = None, err

    def fail(self, error: Exception) -> None:
        """Ends the routine."""
        self.routine.close()
        self.call, self.error = None, error


@dataclass
class BatchRecord:
    """What running routines together took."""

    graph_seconds: float = 0.0
    """Inside of graphs."""
    batches: list[tuple[str, int]] = field(default_factory=list)
    """Graph and samples of every execution."""


@final
class Batcher:
    """Runs routines side by side, and equal graph calls of theirs as one batch.

    Calls are equal if they are of one graph, and their inputs differ in nothing but
    the batch axis: same sizes, and the very same buffers where there is no such axis.
    A routine gets what it would get alone, up to the rounding of kernels that choose
    their tiles by the batch.

    Args:
        models: Graphs by name.
        max_batch: Most samples of one execution.
    """

    def __init__(self, models: Mapping[str, Model], max_batch: int) -> None:
        self._models = models
        self._max_batch = max_batch
        self._rows = _Rows()
        self.record = BatchRecord()

    def run(self, routines: Sequence[Routine[T]]) -> list[Lane[T]]:
        """Runs all routines to their ends; an error ends only those it concerns."""
        self.record = BatchRecord()
        lanes = [Lane(routine) for routine in routines]
        for lane in lanes:
            lane.resume(None)
        while waiting := [lane for lane in lanes if lane.call is not None]:
            behind = min(lane.call.stage for lane in waiting if lane.call is not None)
            groups: dict[Any, list[Lane[T]]] = {}
            for lane in waiting:
                assert lane.call is not None
                if lane.call.stage == behind:
                    groups.setdefault(_kind(lane.call), []).append(lane)
            for group in groups.values():
                self._run_group(group)
        self._rows.clear()
        return lanes

    def _run_group(self, group: Sequence[Lane[T]]) -> None:
        """Executes the one call that all of the lanes wait for, in as few batches."""
        batch: list[Lane[T]] = []
        size = 0
        for lane in group:
            if batch and size + lane.rows > self._max_batch:
                self._run_batch(batch)
                batch, size = [], 0
            batch.append(lane)
            size += lane.rows
        self._run_batch(batch)

    def _run_batch(self, batch: Sequence[Lane[T]]) -> None:
        calls = [lane.call for lane in batch if lane.call is not None]
        try:
            outputs = self._execute(calls, [lane.rows for lane in batch])
        except Exception as err:
            if len(batch) == 1:
                batch[0].fail(err)
                return
            # One of them may be at fault, or all be too many for the memory.
            for lane in batch:
                self._run_batch([lane])
            return
        for lane, own in zip(batch, outputs, strict=True):
            lane.resume(own)

    def _execute(
        self, calls: Sequence[GraphCall], counts: Sequence[int]
    ) -> list[Sequence[Buffer]]:
        """Outputs of each call, from one execution for all."""
        first = calls[0]
        inputs: Sequence[Buffer] = first.inputs
        if len(calls) > 1:
            inputs = [
                value
                if place in first.shared
                else self._rows.gather([call.inputs[place] for call in calls])
                for place, value in enumerate(inputs)
            ]
        started = time.perf_counter()
        outputs = self._models[first.graph].execute(*inputs)
        self.record.graph_seconds += time.perf_counter() - started
        self.record.batches.append((first.graph, sum(counts)))
        if len(calls) == 1:
            return [outputs]
        split = [
            self._rows.split(output, counts, keep=place >= first.num_passing)
            for place, output in enumerate(outputs)
        ]
        return [list(own) for own in zip(*split, strict=True)]


@final
class _Rows:
    """Puts batches together from rows, and takes them apart.

    Rows that only pass on to the next graph are slices of the batch they came in, which
    is remembered: if the next graph takes the same ones, nothing is copied.
    """

    def __init__(self) -> None:
        # By the batch's id; the last few, so that a pass holds no more than it needs.
        self._batches: OrderedDict[int, tuple[Buffer, list[Buffer]]] = OrderedDict()
        self._batch_of: dict[int, int] = {}

    def gather(self, values: Sequence[Buffer]) -> Buffer:
        """The values as one batch."""
        known = self._batch_of.get(id(values[0]))
        if known is not None:
            batch, rows = self._batches[known]
            if [id(value) for value in values] == [id(row) for row in rows]:
                self._batches.move_to_end(known)
                return batch
        return concatenate_rows(values)

    def split(
        self, batch: Buffer, counts: Sequence[int], *, keep: bool
    ) -> list[Buffer]:
        """A batch in parts of so many rows each: copies, if they are to be kept."""
        starts = list(accumulate(counts, initial=0))
        rows = [row_slice(batch, start, stop) for start, stop in pairwise(starts)]
        row_bytes = num_bytes(batch) // int(batch.shape[0])
        if keep:
            return [copied(row) for row in rows]
        # Kernels may count on the alignment that buffers of their own have.
        rows = [
            row if start * row_bytes % _ALIGNMENT == 0 else copied(row)
            for row, start in zip(rows, starts, strict=False)
        ]
        self._batches[id(batch)] = (batch, rows)
        self._batch_of |= dict.fromkeys(map(id, rows), id(batch))
        if len(self._batches) > _MAX_BATCHES:
            _, (_, old) = self._batches.popitem(last=False)
            for row in old:
                del self._batch_of[id(row)]
        return rows

    def clear(self) -> None:
        """Forgets all batches."""
        self._batches.clear()
        self._batch_of.clear()


def _kind(call: GraphCall) -> tuple[Any, ...]:
    """Equal for calls that may be one."""
    return (
        call.graph,
        *(
            id(value) if place in call.shared else (tuple(value.shape[1:]), value.dtype)
            for place, value in enumerate(call.inputs)
        ),
    )
