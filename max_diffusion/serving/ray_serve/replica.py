"""One process with a device of its own: a pipeline and its engine."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, final

from ray import serve
from ray.serve.handle import DeploymentHandle

from ...core.request import GenerationRequest
from ...engine import (
    EngineConfig,
    EngineStats,
    EngineStoppedError,
    Event,
    Failed,
    SubmitOptions,
)
from ...errors import MaxDiffusionError
from ..http import LocalBackend, ModelDescription
from ..http.errors import ApiError
from ..http.run import SWITCH_SECONDS, Model

logger = logging.getLogger(__name__)

INGRESS: Final = "Ingress"
REPORT_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Accepted:
    """First item of a request's stream: a replica's engine has taken the request."""

    replica: str
    """Id of the replica."""


@dataclass(frozen=True)
class ReplicaState:
    """How a replica stands."""

    id: str
    """Ray's own id of the replica, unique in the service's life."""
    pid: int
    is_alive: bool
    """Whether the replica's engine takes requests."""
    description: ModelDescription
    stats: EngineStats
    metrics: str
    """Figures of the replica in Prometheus's text format."""


@final
class Replica:
    """A deployment's class: loads in its constructor, then draws.

    It tells the ``Ingress`` every second how it stands, and is not asked: to Ray a
    question is a request as any other, and waits while a replica is full.

    Args:
        model: The model to load.
        config: Limits of the engine.
    """

    def __init__(self, model: Model, config: EngineConfig) -> None:
        sys.setswitchinterval(SWITCH_SECONDS)
        context = serve.get_replica_context()
        self._id, self._app = context.replica_id.unique_id, context.app_name
        self._backend = LocalBackend()
        self._engine = model.load(self._backend, config)
        self._backend.open(self._engine)
        self._description = ModelDescription.of(self._engine.pipeline)
        self._is_over = threading.Event()
        threading.Thread(target=self._report, name="report", daemon=True).start()

    async def draw(
        self, request: GenerationRequest, options: SubmitOptions
    ) -> AsyncGenerator[Accepted | Event, None]:
        """Submits a request to the engine; closing the stream cancels it.

        Yields:
            ``Accepted``, then the engine's events; or only ``Failed``, if the engine
            refuses it. Errors are items and not raised, as Ray would wrap them.
        """
        try:
            events = await self._backend.draw(request, options)
        except ApiError as err:  # does not pickle
            self._end_if_stopped()
            yield Failed(EngineStoppedError(str(err)))
            return
        except MaxDiffusionError as err:
            self._end_if_stopped()
            yield Failed(err)
            return
        async with aclosing(events):
            yield Accepted(self._id)
            async for event in events:
                if isinstance(event, Failed):
                    self._end_if_stopped()
                yield event

    def state(self) -> ReplicaState:
        """Returns how the replica stands."""
        return ReplicaState(
            id=self._id,
            pid=os.getpid(),
            is_alive=self._engine.is_alive,
            description=self._description,
            stats=self._engine.stats(),
            metrics=self._backend.observer.text().decode(),
        )

    def check_health(self) -> None:
        """Raises unless the engine is alive; called by Ray, which replaces the replica.

        Raises:
            EngineStoppedError: The engine has stopped.
        """
        if not self._engine.is_alive:
            raise EngineStoppedError(
                "replica: its engine has stopped; its log says why"
            )

    def __del__(self) -> None:
        """Closes the engine; called by Ray when no request is left, or time is over."""
        if hasattr(self, "_is_over"):
            self._is_over.set()
            self._engine.close(drain=False)

    def _report(self) -> None:
        ingress = serve.get_deployment_handle(INGRESS, self._app)
        while True:
            try:
                self._tell(ingress)
            except Exception as err:  # it starts, or starts anew: it is told again
                logger.debug("no report: %s", err)
            if self._is_over.wait(REPORT_SECONDS):
                return

    def _tell(self, ingress: DeploymentHandle[Any]) -> None:
        answer = ingress.report.remote(self.state())
        try:
            answer.result(timeout_s=REPORT_SECONDS)
        except TimeoutError:
            answer.cancel()  # type: ignore[no-untyped-call]  # Ray's

    def _end_if_stopped(self) -> None:
        """Ends the process if its engine is dead.

        Ray replaces it after three failed health checks. Until then it would fail
        whatever comes in at once, and so, never being busy, be given the most. A
        process that ends is replaced at once, and its requests are drawn elsewhere.
        """
        if not self._engine.is_alive:
            logger.critical("the engine has stopped; this replica ends")
            logging.shutdown()
            os._exit(1)
