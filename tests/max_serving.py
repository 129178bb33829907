"""``max serve`` with these pipelines, on loopback, and what it is asked."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

PROMPT = "a red circle above a blue square"
SECONDS = 120.0
"""Longest wait for a start or an end, which take about 15 and 2."""


def body(**fields: Any) -> dict[str, Any]:
    """A request that the server answers with a picture that nothing was lost of."""
    image = {"output_format": "png", **fields.pop("image", {})}
    return {
        "model": "demo",
        "input": PROMPT,
        "seed": 7,
        "provider_options": {"image": image},
        **fields,
    }


def as_uri(image: Image.Image | bytes) -> str:
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def message_of(*urls: str, **fields: Any) -> list[dict[str, Any]]:
    images = [{"type": "input_image", "image_url": url, **fields} for url in urls]
    content = [{"type": "input_text", "text": PROMPT}, *images]
    return [{"role": "user", "content": content}]


@dataclass(frozen=True)
class Server:
    """A running ``max serve``."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    def post(self, fields: dict[str, Any]) -> httpx.Response:
        return self.client.post("/v1/responses", json=fields)

    def files(self, fields: dict[str, Any]) -> list[Image.Image]:
        answer = self.post(fields)
        assert answer.status_code == 200, answer.text
        content = answer.json()["output"][0]["content"]
        data = [base64.b64decode(item["image_data"]) for item in content]
        return [Image.open(io.BytesIO(item)) for item in data]

    def images(self, fields: dict[str, Any]) -> np.ndarray:
        return np.stack([np.asarray(file) for file in self.files(fields)])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        with suppress(httpx.TransportError):
            if server.client.get("/health").status_code == 200:
                return
        time.sleep(0.1)
    pytest.fail("max serve did not start:\n" + server.log.read_text()[-4000:])


@contextmanager
def serving(model: Path, folder: Path, own: Mapping[str, str]) -> Iterator[Server]:
    """Runs ``max serve`` with a model, which is called demo; ends all its processes."""
    port = free_port()
    command: list[str | Path] = [
        Path(sys.executable).with_name("max"),
        "serve",
        *("--custom-architectures", "max_diffusion.serving.max_serve"),
        *("--model", model, "--served-model-name", "demo"),
        *("--devices", "cpu", "--port", str(port)),
        *("--quantization-encoding", "float32"),
    ]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "MAX_DIFFUSION_MAX_STEPS": "60",
        "MAX_SERVE_API_TYPES": '["openai","responses"]',
        "MAX_SERVE_DISABLE_TELEMETRY": "1",
        "MAX_SERVE_HOST": "127.0.0.1",
        "MODULAR_TELEMETRY_ENABLED": "0",
    }
    settings |= {f"MAX_DIFFUSION_{name}": value for name, value in own.items()}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,  # MAX reads settings of an .env file there
            env=dict(os.environ) | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which can be ended as one
        )
    address = f"http://127.0.0.1:{port}"
    # A proxy of the environment would be asked for loopback too.
    with httpx.Client(base_url=address, timeout=SECONDS, trust_env=False) as client:
        started = Server(process, client, log)
        try:
            wait_until_ready(started)
            yield started
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
