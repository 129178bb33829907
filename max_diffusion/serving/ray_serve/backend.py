"""Draws by giving each request to a replica, and to another if that one is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import Any, Final, TypeGuard, final

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from ray.serve.handle import DeploymentHandle

from ...core.request import GenerationRequest
from ...engine import (
    DeadlineError,
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    Preview,
    QueueFullError,
    Started,
    StepTaken,
    SubmitOptions,
)
from ...errors import MaxDiffusionError, RequestCancelled, RequestError
from ..http import Backend, ModelDescription
from ..http.backend import Events, Status
from ..http.errors import ApiError
from ..http.schemas import Health
from .metrics import ServiceMetrics
from .replica import REPORT_SECONDS, Accepted, ReplicaState

logger = logging.getLogger(__name__)

# After so many that did not come, a replica is taken for lost.
_REPORTS_KEPT: Final = 10
_STATUS_SECONDS: Final = 5.0


class _LostError(Exception):
    """Says that the replica of a request is gone, or its engine is."""


@final
class ReplicaLostError(ApiError, MaxDiffusionError):
    """The replica that drew a request is gone, and it is not drawn again. HTTP 503."""

    def __init__(self, message: str) -> None:
        super().__init__(
            503, message, code="replica_lost", headers={"Retry-After": "1"}
        )


@final
class RayBackend(Backend):
    """Draws on the replicas of a deployment.

    Args:
        replicas: Handle of deployed :class:`~max_diffusion.serving.ray_serve.Replica`.
    """

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._replicas = replicas
        self._metrics = ServiceMetrics()
        self._description: ModelDescription | None = None
        self._is_described = asyncio.Event()
        self._reports: dict[str, tuple[float, ReplicaState]] = {}

    def report(self, state: ReplicaState) -> None:
        """Takes in how a replica stands."""
        self._reports[state.id] = (time.monotonic(), state)
        self._description = state.description
        self._is_described.set()

    def forget(self, replica: str) -> None:
        """Forgets a replica that is lost, by its id."""
        self._reports.pop(replica, None)

    async def draw(self, request: GenerationRequest, options: SubmitOptions) -> Events:
        """Gives the request to a replica, and waits until that has taken it.

        While all replicas are full it waits here, within its own timeout.
        """
        drawing = _Drawing(self, self._replicas, self._metrics, request, options)
        await drawing.begin()
        return drawing

    async def describe(self) -> ModelDescription | None:
        """Returns what requests may ask, the same of every replica."""
        with contextlib.suppress(TimeoutError):
            # Replicas that are ready have told of it, or do so within a second.
            async with asyncio.timeout(2 * REPORT_SECONDS):
                await self._is_described.wait()
        return self._description

    async def health(self, model: str) -> Health:
        """Returns how the service stands: ready if any replica is.

        Its figures are the sums of those of all replicas.
        """
        states = [state for state in self._states() if state.is_alive]
        running, wanted, failure = len(states), len(states), ""
        with contextlib.suppress(TimeoutError, RayError, RayServeException):
            async with asyncio.timeout(_STATUS_SECONDS):  # Ray's controller may be away
                running, wanted, failure = await asyncio.to_thread(
                    _plan, self._replicas
                )
        figures: Counter[str] = Counter()
        for state in states:
            figures.update(asdict(state.stats))
        ready = min(len(states), running)
        detail = f"{ready} of {wanted} replicas are ready"
        status: Status = "ready" if ready else "failed" if failure else "loading"
        if failure:
            detail += f"; Ray says: {failure}"
        return Health(status=status, detail=detail, model=model, **figures)

    async def metrics(self) -> bytes:
        """Returns the service's figures, and each replica's labelled with its id."""
        texts = {state.id: state.metrics for state in self._states()}
        return await asyncio.to_thread(self._metrics.text, texts)

    def _states(self) -> list[ReplicaState]:
        """Returns the last report of every replica that is not lost."""
        oldest = time.monotonic() - _REPORTS_KEPT * REPORT_SECONDS
        for name, (told, _) in list(self._reports.items()):
            if told < oldest:
                self.forget(name)
        return [state for _, state in self._reports.values()]


@final
class _Drawing(Events):
    """The events of a request, drawn by one replica, or two in turn."""

    def __init__(
        self,
        backend: RayBackend,
        replicas: DeploymentHandle[Any],
        metrics: ServiceMetrics,
        request: GenerationRequest,
        options: SubmitOptions,
    ) -> None:
        self._forget = backend.forget
        self._draw = replicas.options(method_name="draw", stream=True)
        self._metrics = metrics
        self._request = request
        self._options = options
        self._started = time.monotonic()
        self._stream: Any = None
        self._replica = ""
        self._is_retry = False
        self._is_over = False
        # What the client was told of.
        self._has_started = self._has_shown = False
        self._steps = 0

    async def begin(self) -> None:
        """Waits until a replica has taken the request.

        Raises:
            ApiError: There is no replica, or two were lost.
            MaxDiffusionError: The request was refused.
        """
        while True:
            try:
                return await self._submit()
            except _LostError as err:
                self._allow_retry(err)

    async def __anext__(self) -> Event:
        """Waits for the engine's next event that the client was not told before."""
        while not self._is_over:
            event: Accepted | Event | None
            try:
                event = await self._next()
            except _LostError as err:
                event = await self._again(err)
            self._is_over = isinstance(event, Finished | Failed)
            if event is not None and self._is_news(event):
                return event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancels the request where it is, unless it is done."""
        if not self._is_over:
            self._is_over = True
            self._leave()

    async def _submit(self) -> None:
        """Gives the request to a replica of Ray's choice, in the time it has left."""
        timeout, options = self._options.timeout, self._options
        if timeout is not None:
            timeout = max(timeout - (time.monotonic() - self._started), 0.001)
            options = replace(options, timeout=timeout)
        self._stream = self._draw.remote(self._request, options)
        try:
            async with asyncio.timeout(timeout):
                first = await self._next()
        except BaseException as err:
            self._leave()
            if isinstance(err, TimeoutError):
                raise DeadlineError(
                    f"ray_serve: no replica had room in {self._options.timeout:g} s; "
                    "give the request more time, or add replicas"
                ) from err
            raise
        if isinstance(first, Failed):
            raise first.error
        assert isinstance(first, Accepted)
        self._replica = first.replica

    async def _next(self) -> Accepted | Event:
        """Waits for the next item of the stream.

        Raises:
            _LostError: There will be no next item.
            ApiError: There is no replica.
            QueueFullError: Too many requests wait for one.
        """
        try:
            item: Accepted | Event = await anext(self._stream)
        except RayTaskError as err:  # a defect of the replica's code: its log has it
            kind = type(err.cause).__name__
            return Failed(
                MaxDiffusionError(f"replica: a request has failed: {kind}: {err.cause}")
            )
        except (RayError, StopAsyncIteration) as err:
            raise _LostError(str(err).strip().split("\n", maxsplit=1)[0]) from err
        except BackPressureError as err:
            raise QueueFullError(
                "ray_serve: all replicas are full, and as many requests wait as may; "
                "try again later"
            ) from err
        except DeploymentUnavailableError as err:
            raise ApiError(
                503,
                "ray_serve: no replica could be started; the command serve status "
                "says why",
                code="failed",
            ) from err
        stopped = EngineStoppedError | RequestCancelled
        if isinstance(item, Failed) and isinstance(item.error, stopped):
            raise _LostError(str(item.error))
        return item

    def _leave(self) -> None:
        """Cancels the request where it is."""
        # Ray raises here, once more, why it found no replica.
        with contextlib.suppress(RayError, RayServeException):
            self._stream.cancel()

    async def _again(self, error: _LostError) -> Failed | None:
        """Begins anew on another replica; returns ``Failed`` if that cannot be."""
        self._leave()  # the replica may only be out of reach, and still draw
        try:
            self._allow_retry(error)
            await self.begin()
        except (ReplicaLostError, DeadlineError, RequestError) as err:
            return Failed(err)
        except (ApiError, MaxDiffusionError) as err:
            return Failed(self._lost(f"and no other took its request ({err})"))
        return None

    def _allow_retry(self, error: _LostError) -> None:
        """Allows one retry: a request that brings replicas down must not end them all.

        Raises:
            ReplicaLostError: There was a retry already, or an image was sent. What
                another replica draws need not continue it to the last bit.
        """
        logger.warning("a replica was lost: %s", error)
        self._forget(self._replica)
        if self._is_retry:
            raise self._lost("and so was a second one")
        if self._has_shown:
            raise self._lost("after a preview was sent")
        self._is_retry = True
        self._metrics.retried.inc()

    def _lost(self, why: str) -> ReplicaLostError:
        self._metrics.lost.inc()
        return ReplicaLostError(
            f"ray_serve: the replica that drew this was lost, {why}; ask again"
        )

    def _is_news(self, event: Accepted | Event) -> TypeGuard[Event]:
        """Returns whether the client was not told of an event before a retry."""
        if isinstance(event, Started):
            is_news, self._has_started = not self._has_started, True
            return is_news
        if isinstance(event, StepTaken):
            is_news = event.step > self._steps
            self._steps = max(event.step, self._steps)
            return is_news
        self._has_shown = self._has_shown or isinstance(event, Preview)
        return not isinstance(event, Accepted)


def _plan(replicas: DeploymentHandle[Any]) -> tuple[int, int, str]:
    """Returns how many replicas Ray runs, how many it wants, and why it failed.

    The reason is empty unless Ray has given up.
    """
    application = serve.status().applications.get(replicas.app_name)
    if application is None:
        return 0, 0, "the service is being deleted"
    status = application.deployments[replicas.deployment_name]
    counts = Counter({str(state): n for state, n in status.replica_states.items()})
    wanted = counts.total() - counts["STOPPING"] - counts["STOPPED"]
    running = wanted - counts["STARTING"] - counts["RECOVERING"]
    return running, wanted, failure_of(status)


def failure_of(status: Any) -> str:
    """Returns why Ray has given up on a deployment, in a line; empty if it has not."""
    if status.status not in ("UNHEALTHY", "DEPLOY_FAILED"):
        return ""
    # A traceback of several processes, whose last line is the error.
    return str(status.message).strip().rsplit("\n", maxsplit=1)[-1].strip()
