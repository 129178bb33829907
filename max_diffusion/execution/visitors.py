"""Components whose weights are in memory only while they are used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

from .compiler import CompiledGraphs


@final
class Visitors:
    """Loads the weights of some components when they are used, and drops them after.

    May be used from any thread: the weights are dropped when nobody uses them.

    Args:
        graphs: That have them now.
        prefixes: The components' names.
        load: Reads their weights, arrays by registry name.
    """

    def __init__(
        self,
        graphs: CompiledGraphs,
        prefixes: frozenset[str],
        load: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._graphs, self._prefixes, self._load = graphs, prefixes, load
        self._lock = threading.Lock()
        self._users = 0
        graphs.drop(prefixes)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Keeps the weights there.

        Raises:
            ModelLoadError: The files have changed or are gone.
            DeviceError: The device's memory is full.
        """
        with self._lock:
            if not self._users:
                self._graphs.restore(self._prefixes, self._load())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._graphs.drop(self._prefixes)
