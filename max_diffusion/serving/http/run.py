"""Runs a server from its socket to its last answer."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import uvicorn

from ...caches import AbstractCacheConfig
from ...engine import Engine, EngineConfig
from ...errors import MaxDiffusionError, RequestError
from ...pipelines.opening import load_pipeline
from .app import create_app
from .backend import LocalBackend
from .jobs import VideoJobs
from .settings import ServerSettings

logger = logging.getLogger(__name__)

SWITCH_SECONDS: Final = 0.0005
"""Seconds after which Python may switch threads, in a process that has an engine."""
# For what was cancelled to say so.
_CANCEL_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.05


@dataclass(frozen=True)
class Model:
    """What a server loads: arguments of :func:`~max_diffusion.load_pipeline`."""

    path: str
    device: str = "auto"
    dtype: str | None = None
    cache: AbstractCacheConfig | None = None
    caches: Sequence[str | AbstractCacheConfig] = ("none",)
    calibration: str | None = None
    transformer: str | None = None
    variant: str | None = None
    revision: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_memory_limit: int | None = None
    precompiled: Sequence[str] = ()
    require_precompiled: bool = False
    threads: int | None = None
    takes_pictures: bool = False
    offload_text_encoders: bool = False

    def load(self, backend: LocalBackend, config: EngineConfig) -> Engine:
        """Loads and compiles the model, and starts its engine."""

        def on_event(stage: str, what: str) -> None:
            if (stage, what) == ("compile", "start"):
                logger.info("compiling; the first time takes minutes")

        pipeline = load_pipeline(
            self.path,
            device=self.device,
            dtype=self.dtype,
            cache=self.cache,
            caches=self.caches,
            calibration=self.calibration,
            transformer=self.transformer,
            variant=self.variant,
            revision=self.revision,
            adapters=self.adapters,
            adapter_memory_limit=self.adapter_memory_limit,
            precompiled=self.precompiled,
            require_precompiled=self.require_precompiled,
            threads=self.threads,
            takes_pictures=self.takes_pictures,
            offload_text_encoders=self.offload_text_encoders,
            is_extensible=False,  # a request must not wait for minutes
            on_event=on_event,
        )
        for name in self.adapters:
            logger.info(
                "lora %s changes matrices of %d of %d bytes",
                name,
                pipeline.adapters.num_bytes(((name, 1.0),)),
                pipeline.adapters.limit,
            )
        return Engine(pipeline, config, observer=backend.observer)


def serve(
    model: Model,
    settings: ServerSettings,
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain_seconds: float = 30.0,
    has_access_log: bool = False,
) -> None:
    """Answers requests until SIGTERM or Ctrl-C; then finishes those it has.

    Listens at once, and says 503 until the model is there. A second signal cancels
    what is left.

    Raises:
        RequestError: The server cannot listen on the address, or an argument is
            malformed.
        ModelLoadError: The model does not load.
        CompileError: A graph does not compile.
        DeviceError: There is no such device.
    """
    if not 0 <= drain_seconds < float("inf"):
        raise RequestError(
            f"--drain-timeout: expected seconds, 0 or more, got {drain_seconds}"
        )
    # The engine's thread is back in Python for a moment between two graphs, and would
    # wait 5 ms for whatever else is there.
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    listener = listen(host, port)
    address = shown_address(listener)
    logger.info("%s on %s (/docs, /metrics), loading", settings.model, address)
    backend = LocalBackend()
    app = create_app(backend, settings)
    uvicorn_config = uvicorn.Config(
        app,
        log_config=None,
        access_log=has_access_log,
        lifespan="off",
        # For answers that are being sent when all is drawn.
        timeout_graceful_shutdown=math.ceil(drain_seconds + _CANCEL_SECONDS),
    )
    server = _Server(uvicorn_config)
    loading = _Loading(model, config, backend, server)
    threading.Thread(target=loading.run, name="load", daemon=True).start()
    jobs: VideoJobs = app.state.video_jobs
    asyncio.run(_run(server, backend, listener, loading, jobs, drain_seconds))
    if not loading.is_over.is_set():
        logger.info("stopped while loading")
        sys.stderr.flush()
        os._exit(0)  # MAX cannot be interrupted while it compiles
    if loading.engine is not None:
        loading.engine.close(drain=False)
    if loading.error is not None:
        raise loading.error
    logger.info("stopped")


@final
@dataclass
class _Loading:
    """Loads in a thread of its own, and stops the server if that fails."""

    model: Model
    config: EngineConfig
    backend: LocalBackend
    server: uvicorn.Server
    engine: Engine | None = None
    error: MaxDiffusionError | None = None
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        started = time.monotonic()
        try:
            self.engine = self.model.load(self.backend, self.config)
            self.backend.open(self.engine)
            logger.info("ready after %.1f s", time.monotonic() - started)
        except MaxDiffusionError as err:
            self.error = err
        except Exception as err:
            logger.exception("loading has failed")
            self.error = MaxDiffusionError(f"serve: loading has failed: {err}")
        self.is_over.set()
        if self.error is not None:
            self.server.should_exit = True


class _Server(uvicorn.Server):
    """Leaves signals to :func:`_run`: uvicorn raises them again after its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures no signals."""
        yield


async def _run(
    server: uvicorn.Server,
    backend: LocalBackend,
    listener: socket.socket,
    loading: _Loading,
    jobs: VideoJobs,
    drain_seconds: float,
) -> None:
    loop = asyncio.get_running_loop()
    # Until when requests that were asked for may take; none while there is no signal.
    deadline: float | None = None
    draining: asyncio.Task[None] | None = None
    is_cancelled = False

    def cancel() -> None:
        nonlocal is_cancelled
        is_cancelled = True
        # Clients are told, as of any request that is cancelled.
        if loading.engine is not None:
            loading.engine.cancel_all()

    async def drain() -> None:
        """Answers until all is drawn: that it is alive, and that others must ask."""
        engine, began = loading.engine, time.monotonic()
        while engine is not None and loop.time() < (deadline or 0):
            stats = engine.stats()
            if not stats.queued and not stats.running:
                break
            await asyncio.sleep(_POLL_SECONDS)
        # What was drawn for somebody who cannot have it any more would be for nobody.
        while not is_cancelled and jobs.num_awaited(began):
            await asyncio.sleep(_POLL_SECONDS)
        server.should_exit = True

    def stop() -> None:
        nonlocal deadline, draining
        if draining is not None:
            logger.info("cancelling what is left")
            deadline = loop.time() + _CANCEL_SECONDS
            cancel()
            return
        backend.drain()
        deadline = loop.time() + drain_seconds + _CANCEL_SECONDS
        loop.call_later(drain_seconds, cancel)
        draining = loop.create_task(drain())
        logger.info("finishing what was asked; a second signal cancels it")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await server.serve(sockets=[listener])


def shown_address(listener: socket.socket) -> str:
    """Returns the URL at which a browser of this machine reaches a bound socket."""
    bound, port = listener.getsockname()[:2]
    bound, _, zone = bound.partition("%")
    address = ipaddress.ip_address(bound)
    is_all = address.is_unspecified  # all of the machine's addresses, and itself none
    if address.version == 6:
        zone = f"%25{zone}" if zone else ""  # as RFC 6874 writes it
        shown = "[::1]" if is_all else f"[{bound}{zone}]"
    else:
        shown = "127.0.0.1" if is_all else bound
    return f"http://{shown}:{port}" + (" and all other addresses" if is_all else "")


def listen(host: str, port: int) -> socket.socket:
    """Creates a socket that is bound to an address.

    Raises:
        RequestError: The server cannot listen on the address.
    """
    if not 0 <= port <= 65535:
        raise RequestError(f"--port: expected 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "no such name"
        raise RequestError(
            f"serve: cannot listen on {host} port {port} ({reason}); choose another "
            "--port or --host"
        ) from err
    return listener
