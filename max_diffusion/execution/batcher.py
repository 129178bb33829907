"""Routines of several requests run together: equal graph calls become one."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast, final

import numpy as np
from max.driver import Buffer

from ..core.buffers import (
    concatenate_rows,
    copied,
    num_bytes,
    row_slice,
    split_rows,
)
from .graph_call import Fork, GraphCall, Routine, model_of, on_device

if TYPE_CHECKING:
    from max.engine import Model

T = TypeVar("T")
_MAX_BATCHES: Final = 8
_ALIGNMENT: Final = 64


@dataclass(eq=False)
class Lane(Generic[T]):
    """One routine among those that run together."""

    routine: Routine[T]
    parent: Lane[Any] | None = None
    """Whose fork it is part of."""
    call: GraphCall | None = None
    """What it waits for; ``None`` at its end, and while its parts run."""
    rows: int = 0
    """Samples of the call."""
    parts: list[Lane[Any]] = field(default_factory=list)
    """Routines it waits for."""
    result: T | None = None
    error: Exception | None = None
    is_done: bool = False

    def resume(self, outputs: Any) -> list[Lane[Any]]:
        """Runs the routine to its next call, or its end.

        Returns:
            Those that wait for a call now: itself, its parts, or who waited for it.
        """
        try:
            call = self.routine.send(outputs)
        except StopIteration as stop:
            return self._end(stop.value, None)
        except Exception as err:
            return self._end(None, err)
        if isinstance(call, Fork):
            self.call = None
            self.parts = [Lane(routine, self) for routine in call.routines]
            return [lane for part in self.parts for lane in part.resume(None)]
        self.call = call
        place = 0
        while place in call.shared:
            place += 1
        self.rows = int(call.inputs[place].shape[0])
        return [self]

    def fail(self, error: Exception) -> list[Lane[Any]]:
        """Ends the routine, and those it is part of."""
        self.routine.close()
        return self._end(None, error)

    def _end(self, result: T | None, error: Exception | None) -> list[Lane[Any]]:
        self.call, self.result, self.error = None, result, error
        self.is_done = True
        parent = self.parent
        if parent is None or parent.is_done:
            return []
        if error is not None:
            for part in parent.parts:
                part.call, part.is_done = None, True
            return parent.fail(error)
        if not all(part.is_done for part in parent.parts):
            return []
        # They know their parent: kept, both would hold their buffers until Python looks
        # for such circles.
        parts, parent.parts = parent.parts, []
        return parent.resume([part.result for part in parts])


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

    Calls are equal if they are of one graph with the same weights, and their inputs
    differ in nothing but the batch axis: same sizes, and the very same buffers where
    there is no such axis.
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
        waiting = [each for lane in lanes for each in lane.resume(None)]
        while waiting:
            if len(waiting) == 1:
                waiting = self._run_batch(waiting)
                continue
            behind = min(lane.call.stage for lane in waiting if lane.call is not None)
            groups: dict[Any, list[Lane[Any]]] = {}
            ahead: list[Lane[Any]] = []
            for lane in waiting:
                # A part whose sibling has failed waits for nothing any more.
                if lane.call is not None and lane.call.stage == behind:
                    groups.setdefault(self._kind(lane.call), []).append(lane)
                elif lane.call is not None:
                    ahead.append(lane)
            waiting = ahead
            for group in groups.values():
                waiting += self._run_group(group)
            waiting = [lane for lane in waiting if lane.call is not None]
        self._rows.end_turn()
        return lanes

    def run_one(self, routine: Routine[T]) -> T:
        """Runs one routine, and the parts of its forks side by side.

        Raises:
            Exception: What the routine raised.
        """
        [lane] = self.run([routine])
        if lane.error is not None:
            raise lane.error
        return cast(T, lane.result)

    def _run_group(self, group: Sequence[Lane[Any]]) -> list[Lane[Any]]:
        """Executes the one call that all of the lanes wait for, in as few batches."""
        waiting: list[Lane[Any]] = []
        batch: list[Lane[Any]] = []
        size = 0
        for lane in group:
            if batch and size + lane.rows > self._max_batch:
                waiting += self._run_batch(batch)
                batch, size = [], 0
            batch.append(lane)
            size += lane.rows
        return waiting + self._run_batch(batch)

    def _run_batch(self, batch: Sequence[Lane[Any]]) -> list[Lane[Any]]:
        pairs = [(lane, lane.call) for lane in batch if lane.call is not None]
        if not pairs:
            return []  # they were parts of what has failed
        calls = [call for _, call in pairs]
        try:
            outputs = self._execute(calls, [lane.rows for lane, _ in pairs])
        except Exception as err:
            if len(pairs) == 1:
                return pairs[0][0].fail(err)
            # One of them may be at fault, or all be too many for the memory.
            return [each for lane, _ in pairs for each in self._run_batch([lane])]
        waiting: list[Lane[Any]] = []
        for (lane, _), own in zip(pairs, outputs, strict=True):
            if not lane.is_done:  # by a sibling that has failed
                waiting += lane.resume(own)
        return waiting

    def _execute(
        self, calls: Sequence[GraphCall], counts: Sequence[int]
    ) -> list[Sequence[Buffer]]:
        """Outputs of each call, from one execution for all."""
        first = calls[0]
        inputs = first.inputs
        if len(calls) > 1:
            inputs = tuple(
                value
                if place in first.shared
                else self._rows.gather(
                    [call.inputs[place] for call in calls], place in first.constant
                )
                for place, value in enumerate(inputs)
            )
        placed = [on_device(value, first.device) for value in inputs]
        started = time.perf_counter()
        outputs = model_of(self._models, first).execute(*placed)
        self.record.graph_seconds += time.perf_counter() - started
        self.record.batches.append((first.graph, sum(counts)))
        if len(calls) == 1:
            return [outputs]
        split = [
            self._rows.split(output, counts, keep=place >= first.num_passing)
            for place, output in enumerate(outputs)
        ]
        return [list(own) for own in zip(*split, strict=True)]

    def _kind(self, call: GraphCall) -> tuple[Any, ...]:
        """Equal for calls that may be one."""
        return (
            call.graph,
            id(model_of(self._models, call)),
            *(
                id(value) if place in call.shared else tuple(value.shape[1:])
                for place, value in enumerate(call.inputs)
            ),
        )


@final
class _Rows:
    """Puts batches together from rows, and takes them apart.

    Both are remembered: if another graph takes the same rows, nothing is put together
    again. Rows that only pass on to the next graph are slices of the batch they came
    in.
    """

    def __init__(self) -> None:
        # By the batch's id; a few, so that a pass holds no more than it needs. Those
        # whose rows pass on are the last to be forgotten.
        self._batches: OrderedDict[int, tuple[Buffer, Sequence[Buffer]]] = OrderedDict()
        self._batch_of: dict[int, int] = {}
        self._constants: dict[tuple[int, ...], tuple[Sequence[Buffer], Buffer]] = {}
        self._used: set[tuple[int, ...]] = set()

    def gather(self, values: Sequence[Any], is_constant: bool) -> Any:
        """The values as one batch."""
        if isinstance(values[0], np.ndarray):
            return np.concatenate(values)
        if is_constant:
            return self._gather_constant(values)
        known = self._batch_of.get(id(values[0]))
        if known is not None:
            batch, rows = self._batches[known]
            if [id(value) for value in values] == [id(row) for row in rows]:
                self._batches.move_to_end(known)
                return batch
        batch = concatenate_rows(values)
        self._remember(batch, values, passes_on=False)
        return batch

    def _gather_constant(self, values: Sequence[Buffer]) -> Buffer:
        """Keeps the batch while the same requests go together."""
        key = tuple(map(id, values))
        kept = self._constants.pop(key, None)
        if kept is None:
            # With the values, so that their ids stay theirs.
            kept = values, concatenate_rows(values)
        self._constants[key] = kept
        self._used.add(key)
        return kept[1]

    def split(
        self, batch: Buffer, counts: Sequence[int], *, keep: bool
    ) -> list[Buffer]:
        """A batch in parts of so many rows each: copies, if they are to be kept."""
        if keep:
            rows = split_rows(batch, counts)
        else:
            starts = list(accumulate(counts, initial=0))
            row_bytes = num_bytes(batch) // int(batch.shape[0])
            rows = [row_slice(batch, start, stop) for start, stop in pairwise(starts)]
            # Kernels may count on the alignment that buffers of their own have.
            rows = [
                row if start * row_bytes % _ALIGNMENT == 0 else copied(row)
                for row, start in zip(rows, starts, strict=False)
            ]
        self._remember(batch, rows, passes_on=not keep)
        return rows

    def _remember(
        self, batch: Buffer, rows: Sequence[Buffer], *, passes_on: bool
    ) -> None:
        key = id(batch)
        self._batches[key] = (batch, rows)
        self._batches.move_to_end(key, last=passes_on)
        self._batch_of |= dict.fromkeys(map(id, rows), key)
        if len(self._batches) > _MAX_BATCHES:
            key, (_, old) = self._batches.popitem(last=False)
            for row in old:
                if self._batch_of.get(id(row)) == key:  # and no newer one
                    del self._batch_of[id(row)]

    def end_turn(self) -> None:
        """Forgets all batches, but for constants that were used in this turn."""
        self._batches.clear()
        self._batch_of.clear()
        for key in self._constants.keys() - self._used:
            del self._constants[key]
        self._used.clear()
