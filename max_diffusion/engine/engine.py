"""The engine: many requests on one device, batched step by step."""

from __future__ import annotations

import atexit
import os
import uuid
from dataclasses import replace
from types import TracebackType
from typing import Self, final

from ..caches import label_of
from ..core.request import GenerationRequest
from ..errors import CacheNotLoadedError, RequestError
from ..execution.compiler import check_not_forked, memory_errors_said
from ..pipelines.text_to_image import TextToImagePipeline
from .admission import Admission
from .config import EngineConfig
from .executor import Executor
from .memory import MemoryPlan, default_memory_limit
from .observer import EngineObserver, EngineStats
from .requests import EngineStoppedError, Listener, RequestHandle, SubmitOptions


@final
class Engine:
    """Draws the pictures of many requests at once on one device.

    One thread runs the device. In every turn each request takes one step: its cache
    decides what that is, and whatever several of them need is run once for all. So
    requests of any size, cache and number of steps run side by side, and begin and end
    between any two turns. A request's picture and its cache's decisions are those it
    gets alone.

    Where more pictures run than fit in a turn (``max_step_samples``), those that had
    the smallest share of the device go first, so that no request starves another. A
    turn takes as long as its largest steps, so those over four times as large as the
    smallest pass turns over until the others have had as much of the device.
    Encoding and decoding happen between turns, for about half as long as a turn takes,
    or one at a time where one takes longer; previews where nothing else waits.

    Use it as a context manager, or :meth:`close` it.

    Args:
        pipeline: A loaded pipeline. The engine's thread is the only one to run it.
        config: Limits.
        observer: Is told of every turn.

    Raises:
        RequestError: No request of the model could keep the limit of memory.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        config: EngineConfig | None = None,
        *,
        observer: EngineObserver | None = None,
    ) -> None:
        self.pipeline = pipeline
        """What draws."""
        self.config = config or EngineConfig()
        """Its limits."""
        limit = self.config.memory_limit
        limit = default_memory_limit(pipeline.device) if limit is None else limit
        self._plan = MemoryPlan(pipeline, limit)
        self._plan.check_limit()
        self._admission = Admission(self.config, self._plan)
        self._executor = Executor(
            pipeline, self.config, self._admission, observer or EngineObserver()
        )
        # A fork has neither the thread nor whoever might hold the lock.
        self._process = os.getpid()
        # A thread that is inside of MAX when Python ends would bring it down.
        atexit.register(self._close_at_exit)

    def _close_at_exit(self) -> None:
        self.close(drain=False)

    def __enter__(self) -> Self:
        """The running engine."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finishes what was submitted; after an error, cancels it."""
        self.close(drain=kind is None)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._executor.is_alive and not self._admission.is_closing

    def stats(self) -> EngineStats:
        """How many requests wait and run now, and the bytes they hold."""
        return self._admission.stats()

    def submit(
        self,
        request: GenerationRequest,
        options: SubmitOptions | None = None,
        *,
        listener: Listener | None = None,
    ) -> RequestHandle:
        """Puts a request in the queue; never waits.

        Args:
            request: What to draw.
            options: Priority, deadline, previews.
            listener: Called with every event, on the engine's thread: it must be quick.
                Without one, read :meth:`RequestHandle.events`.

        Raises:
            RequestError: A value is malformed or out of range, or the request needs
                more memory than there is.
            CacheNotLoadedError: The request's cache needs graphs that are not compiled.
            QueueFullError: Too many requests wait.
            EngineStoppedError: The engine is closing.
            DeviceError: This process is a fork of the engine's.
        """
        check_not_forked(self._process)
        options = SubmitOptions() if options is None else options
        for value, kind in ((request, GenerationRequest), (options, SubmitOptions)):
            if not isinstance(value, kind):
                raise RequestError(
                    f"engine: expected a {kind.__name__}, got {type(value).__name__}"
                )
        with memory_errors_said():
            context = self.pipeline.create_context(request)
        cache = context.cache.config
        if not self.pipeline.graph_groups.issuperset(cache.graph_groups):
            raise CacheNotLoadedError(
                f"engine: {label_of(cache)} needs graphs that are not compiled, and "
                "compiling them would stop all requests for minutes",
                label_of(cache),
            )
        if request.inputs is not None and not self.pipeline.graphs.has_pictures:
            raise RequestError(
                "request: image needs graphs that are not compiled, and compiling them "
                "would stop all requests for minutes; load the model with "
                "takes_pictures"
            )
        needed = self._plan.needed_by(context)
        admission = self._admission
        # Its pixels may be a hundred times what is drawn, and are in no plan.
        kept = request if request.inputs is None else replace(request, inputs=None)
        handle = RequestHandle(uuid.uuid4().hex, kept, admission.cancel, listener)
        with admission.lock:
            if not self.is_alive:
                raise EngineStoppedError(
                    "engine: it is closing and takes no more requests; ask another"
                )
            admission.add(handle, context, options, needed)
        return handle

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and ends.

        In a fork it does nothing: the engine runs on in the process that it is of.

        Args:
            drain: Finish what was submitted; otherwise it is cancelled.
            timeout: Seconds to drain; what is left then is cancelled.
        """
        if os.getpid() != self._process:
            return
        self._admission.close()
        if drain:
            self._executor.join(timeout)
        self.cancel_all()
        self._executor.join()
        atexit.unregister(self._close_at_exit)

    def cancel_all(self) -> None:
        """Cancels every request there is; in a fork, none."""
        if os.getpid() == self._process:
            self._admission.cancel_all()
