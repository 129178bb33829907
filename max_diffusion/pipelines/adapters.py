"""LoRAs that requests choose: second sets of only the matrices that they change.

A set is of one choice of LoRAs with their weights. It is merged in float32 when it is
first asked for; compiled graphs take their weights from a registry, so that nothing is
compiled. What a choice takes is known before. Sets that were used longest ago leave
where others need their room.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar, final

import numpy as np
from max.driver import Device

from graphs.weights import WeightSlot

from ..checkpoint.tensors import NonFiniteTensor
from ..core.host_memory import free_memory
from ..core.loras import Loras
from ..errors import DeviceError, RequestError
from ..execution.compiler import AdaptedGraphs
from .graphs import PipelineGraphs
from .weight_memory import memory_beside_weights

if TYPE_CHECKING:
    from .pipeline import DiffusionPipeline

P = TypeVar("P", bound="DiffusionPipeline")


@final
class AdapterSets:
    """The LoRAs that requests may choose, and the sets of matrices that are loaded.

    May be used from any thread; one set is made at a time.

    Args:
        graphs: Of the pipeline; its files have the LoRAs.
        device: Where the matrices live.
        limit: Most bytes of all sets together; ``None`` for a quarter of what is free
            when the graphs are compiled, or the first is asked for.

    Raises:
        RequestError: One of the LoRAs alone is above the limit.
    """

    def __init__(
        self, graphs: PipelineGraphs, device: Device, limit: int | None = None
    ) -> None:
        self._graphs, self._device, self._limit = graphs, device, limit
        self._loaded: OrderedDict[Loras, AdaptedGraphs] = OrderedDict()
        # Else each of several threads would make room, and then all of them sets.
        self._lock = threading.RLock()
        if limit is not None:
            self.check_limit()

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may choose."""
        return tuple(self._graphs.opened.adapters)

    @property
    def limit(self) -> int:
        """Most bytes that all sets together take."""
        if self._limit is None:
            self._limit = free_memory(self._device) // 4
        return self._limit

    @property
    def held_bytes(self) -> int:
        """Bytes of the sets that are loaded."""
        return sum(held.num_bytes for held in list(self._loaded.values()))

    def check_limit(self) -> None:
        """Refuses a LoRA that no request could choose: alone it is above the limit.

        Raises:
            RequestError: There is one.
        """
        if self.names:
            self._check_largest(self.limit)

    def check_room(self) -> None:
        """Refuses a LoRA that would not fit beside the weights, before they are loaded.

        Raises:
            DeviceError: The device has not so much memory.
            RequestError: It is above the limit that there will be by default.
        """
        if not self.names or self._graphs.is_compiled:
            return
        left = memory_beside_weights(self._graphs.opened, self._device)
        if left < 0:
            return  # of weights that do not fit, their own check tells
        name, needed = self._largest()
        if needed > left:
            where = "this machine" if self._device.is_host else "the device"
            raise DeviceError(
                f"adapters: the LoRA {name} changes matrices of {needed} bytes, more "
                f"than the {left} that {where} has beside the model's weights; leave "
                "it out, or take another device"
            )
        if self._limit is None:
            self._check_largest(left // 4)

    def _check_largest(self, limit: int) -> None:
        name, needed = self._largest()
        if needed > limit:
            raise RequestError(
                f"adapters: the LoRA {name} changes matrices of {needed} bytes, more "
                f"than the limit of {limit} for LoRAs, by default a quarter of what "
                "is free; raise it (adapter_memory_limit, --lora-memory), or leave "
                "the LoRA out"
            )

    def _largest(self) -> tuple[str, int]:
        """The LoRA that changes most, and its bytes."""
        sizes = {name: self.num_bytes(((name, 1.0),)) for name in self.names}
        return max(sizes.items(), key=itemgetter(1))

    def chosen(self, loras: Loras) -> Loras:
        """A choice as sets are known by: in order, without those of weight 0.

        Raises:
            RequestError: There is no such LoRA, or the set alone is above the limit.
        """
        known = self._graphs.opened.adapters
        for name, _ in loras:
            if name not in known:
                there = f"there are {', '.join(known)}" if known else "there is none"
                raise RequestError(
                    f"request: loras: {name!r:.80} is not known here, {there}; name "
                    "files at load"
                )
        choice = tuple(sorted(pair for pair in loras if pair[1]))
        needed = self.num_bytes(choice)
        if choice and needed > self.limit:
            raise RequestError(
                f"request: loras: {_shown(choice)} changes matrices of {needed} bytes, "
                f"more than the limit of {self.limit}; raise it, choose others, or "
                "merge them at load"
            )
        return choice

    def num_bytes(self, loras: Loras) -> int:
        """Bytes of the set of a choice, whether it is loaded or not."""
        return sum(
            int(np.prod(slot.shape)) * slot.dtype.size_in_bytes
            for slots in self._changed(loras).values()
            for slot in slots.values()
        )

    def components(self, loras: Loras) -> set[str]:
        """Names of the components that a choice changes."""
        adapters = self._graphs.opened.adapters
        return {part for name, _ in loras for part in adapters[name].changed}

    def make_room(self, wanted: Iterable[Loras]) -> None:
        """Drops what was used longest ago, until there is room for some sets.

        Args:
            wanted: Choices that are used now; those that are loaded stay.
        """
        needed = {choice: self.num_bytes(choice) for choice in wanted if choice}
        with self._lock:
            total = sum(needed.values())
            idle = [choice for choice in self._loaded if choice not in needed]
            total += sum(self._loaded[choice].num_bytes for choice in idle)
            for choice in idle:
                if total <= self.limit:
                    break
                total -= self._loaded.pop(choice).num_bytes

    def graphs_of(self, loras: Loras) -> AdaptedGraphs:
        """All graphs of the pipeline by name, those that LoRAs change with their set.

        Whoever has them keeps the set's matrices alive.

        Args:
            loras: From :meth:`chosen`.

        Raises:
            RequestError: The merged matrices are not finite.
            ModelLoadError: A file was changed since it was read.
        """
        with self._lock:
            held = self._loaded.get(loras)
            # Text encoders may come and go: a set that was made without them has none.
            if held is None or not set(held).issuperset(self._graphs.models):
                self._loaded.pop(loras, None)
                self.make_room([loras])
                held = self._load(loras)
                self._loaded[loras] = held
            self._loaded.move_to_end(loras)
            return held

    def _load(self, loras: Loras) -> AdaptedGraphs:
        opened = self._graphs.opened
        arrays = {}
        for component, slots in self._changed(loras).items():
            needs, weights = opened.sources[component]
            for name, weight in loras:
                adapter = opened.adapters[name].adapters.get(component)
                if adapter is not None:
                    weights = weights.adapted(adapter, weight)
            try:
                loaded = weights.load(slots)
            except NonFiniteTensor as err:
                files = {item.file for item in err.stored}
                chosen = [
                    pair for pair in loras if opened.adapters[pair[0]].path in files
                ]
                raise RequestError(
                    f"request: loras: {_shown(chosen)} cannot be merged ({err})"
                ) from err
            for key, array in loaded.items():
                arrays[f"{needs.prefix}.{key}"] = array
        return self._graphs.adapted(arrays)

    def _changed(self, loras: Loras) -> Mapping[str, Mapping[str, WeightSlot]]:
        """Slots that a choice fills otherwise, by component."""
        adapters = [self._graphs.opened.adapters[name] for name, _ in loras]
        found = {}
        for component in sorted(self.components(loras)):
            names = {
                name for each in adapters for name in each.changed.get(component, ())
            }
            found[component] = {
                key: slot
                for key, slot in self._graphs.slots(component).items()
                if not names.isdisjoint(slot.tensors)
            }
        return found


def adapted(pipeline: P, loras: Loras) -> P:
    """The same pipeline with matrices that LoRAs change, for one request.

    Nothing is compiled. It shares all else, and keeps these matrices in memory.

    Args:
        pipeline: A compiled one.
        loras: From :meth:`AdapterSets.chosen`; without any it is the pipeline itself.
    """
    if not loras:
        return pipeline
    models = pipeline.adapters.graphs_of(loras)
    found = copy.copy(pipeline)
    found.graphs = pipeline.graphs.over(models)
    found.loaded = {name: copy.copy(each) for name, each in pipeline.loaded.items()}
    for component in found.loaded.values():
        component.bind(models)
        component.load_model()
    return found


def _shown(loras: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name}:{weight:g}" for name, weight in loras)
