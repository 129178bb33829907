"""The service: replicas, and one process that speaks HTTP for them."""

# No "from __future__ import annotations": Ray reads the class of app's argument from
# its signature, where text is no class to it.

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ...errors import MaxDiffusionError
from ..http import ServerSettings, create_app
from ..http.settings import read_api_keys
from .backend import RayBackend, failure_of
from .options import Options
from .replica import INGRESS, Replica, ReplicaState

# More than ever wait: what is too much, the replicas' own limits say.
_MAX_CONNECTIONS = 100_000
_MAX_STARTS = 3
_NAME = "default"
# For answers after the replicas' own time to drain is over.
_LAST_WORDS_SECONDS = 5.0


@serve.ingress()
class Ingress:
    """A deployment's class: the application of ``max-diffusion serve``, over replicas.

    There is one, as images that wait to be fetched by their address, and jobs that draw
    videos, are in its memory.
    It draws nothing.

    Args:
        replicas: Handle of the replicas, which draw.
        settings: Limits; without keys, which would be kept in Ray's own state.
        api_key_file: File that the keys are read from; ``None`` for no keys.
    """

    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        settings: ServerSettings,
        api_key_file: str | None,
    ) -> None:
        keys = () if api_key_file is None else read_api_keys(Path(api_key_file))
        settings = replace(settings, api_keys=keys)
        self._backend = RayBackend(replicas)
        self._app = create_app(self._backend, settings)

    async def report(self, state: ReplicaState) -> None:
        """Takes in how a replica stands; called by replicas."""
        self._backend.report(state)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns what answers requests; called by Ray."""
        return self._app


def app(options: Options) -> Application:
    """Builds the service; ``serve run`` and Ray's configuration files call it.

    Raises:
        RequestError: An option is out of range.
    """
    key_file = options.api_key_file and str(Path(options.api_key_file).resolve())
    if key_file is not None:
        read_api_keys(Path(key_file))  # what is wrong with it, before anything starts
    is_gpu = options.kind == "gpu"
    replica = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": int(is_gpu)},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.most_replicas,
            "target_ongoing_requests": options.target_ongoing_requests,
            "look_back_period_s": options.look_back_period,
            "upscale_delay_s": options.upscale_delay,
            "downscale_delay_s": options.downscale_delay,
        },
        max_ongoing_requests=options.max_ongoing_requests,
        max_queued_requests=options.max_queued_requests,
        graceful_shutdown_timeout_s=options.drain_timeout,
        health_check_period_s=options.health_check_period,
        max_constructor_retry_count=_MAX_STARTS,
        logging_config={"enable_access_log": options.access_log},
    )(Replica)
    ingress = serve.deployment(
        name=INGRESS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_MAX_CONNECTIONS,
        graceful_shutdown_timeout_s=options.drain_timeout + _LAST_WORDS_SECONDS,
        max_constructor_retry_count=_MAX_STARTS,
        logging_config={"enable_access_log": options.access_log},
    )(Ingress)
    replicas = replica.bind(options.loader(), options.engine())
    return ingress.bind(replicas, options.settings(), key_file)


def start(
    options: Options | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    blocking: bool = False,
) -> DeploymentHandle[Any]:
    """Starts the service in the Ray this process is connected to.

    Without a connection, a Ray of this process's own is started, without its dashboard
    and its statistics of use.

    Args:
        options: What to serve; ``None`` for the defaults.
        host: Address that Ray's HTTP proxy listens on; 0.0.0.0 is all.
        port: Port that the proxy listens on.
        blocking: Whether to stay until Ctrl-C.

    Returns:
        A handle of the ``Ingress``, when the replicas are ready.

    Raises:
        RequestError: An option is out of range.
        MaxDiffusionError: Ray could not start it: the model does not load, say.
    """
    service = app(options or Options())
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", include_dashboard=False)
    serve.start(http_options={"host": host, "port": port})
    try:
        return serve.run(service, name=_NAME, blocking=blocking)
    except RuntimeError as err:
        found = serve.status().applications[_NAME].deployments
        why = "; ".join(filter(None, map(failure_of, found.values())))
        raise MaxDiffusionError(f"ray_serve: it did not start: {why or err}") from err
