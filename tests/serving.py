"""Servers for tests: in this process, or as a user starts them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from max_diffusion import TextToImagePipeline
from max_diffusion.engine import Engine, EngineConfig
from max_diffusion.serving.http import Backend, LocalBackend, ServerSettings, create_app

# Beside the interpreter, as installed: this is what people type.
COMMAND = (str(Path(sys.executable).with_name("max-diffusion")), "serve")


@dataclass
class Served:
    """A running server."""

    url: str
    engine: Engine
    backend: LocalBackend

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=120)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)


@contextlib.contextmanager
def served(
    pipeline: TextToImagePipeline,
    config: EngineConfig | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """A real server on a free port, in threads of this process."""
    backend = LocalBackend()
    with listening(backend, **settings) as url:
        engine = Engine(pipeline, config, observer=backend.observer)
        try:
            backend.open(engine)
            yield Served(url, engine, backend)
        finally:
            engine.close(drain=False)


@contextlib.contextmanager
def listening(backend: Backend, **settings: Any) -> Iterator[str]:
    """The same over any backend; its address."""
    app = create_app(backend, ServerSettings(**settings))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def started(*options: str, cwd: Path | None = None) -> Iterator[Any]:
    """``max-diffusion serve`` as a process, killed at the end if it has not ended."""
    process = subprocess.Popen(
        [*COMMAND, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        cwd=cwd,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    """Waits for something that must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
