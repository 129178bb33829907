"""A schema fuzzer against the server's own document."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_checks
import pytest
import toy_video
from processes import run
from serving import Served, served

from max_diffusion import TextToImagePipeline

KEY = "sk-fuzz"


@pytest.fixture(scope="module")
def server(demo: TextToImagePipeline) -> Iterator[Served]:
    # Small, so that what is valid is quick to draw.
    limits: dict[str, Any] = {"max_n": 2, "max_size": 128, "max_steps": 3}
    with served(demo, api_keys=(KEY,), **limits) as server:
        yield server


def fuzzed(url: str, folder: Path, *options: str) -> None:
    """Answers are of a documented status, type and schema, whatever is sent."""
    done = run(
        *(Path(sys.executable).with_name("schemathesis"), "run"),
        f"{url}/openapi.json",
        *("--header", f"Authorization: Bearer {KEY}"),
        *("--max-examples", "100", "--seed", "1", "--no-color"),
        *("--phases", "examples,coverage,fuzzing"),
        "--checks",
        "no_failure,status_code_conformance,content_type_conformance,"
        "response_schema_conformance,response_headers_conformance",
        *options,
        cwd=folder,
        env=dict(os.environ)
        | {
            "PYTHONPATH": str(Path(fuzz_checks.__file__).parent),
            "SCHEMATHESIS_HOOKS": fuzz_checks.__name__,
        },
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_no_body_makes_the_server_fail(server: Served, tmp_path: Path) -> None:
    fuzzed(server.url, tmp_path)
    assert server.post(prompt="x").status_code == 401
    text = server.get("/metrics").text
    assert 'max_diffusion_request_seconds_count{state="failed"}' not in text


def test_no_body_makes_a_server_of_videos_fail(tmp_path: Path) -> None:
    with toy_video.registered():
        pipeline = toy_video.load(toy_video.write_folder(tmp_path / "model"))
        with served(pipeline, api_keys=(KEY,), max_size=32, max_steps=3) as server:
            fuzzed(server.url, tmp_path, "--include-path-regex", "^/v1/videos")
            text = server.get("/metrics").text
    assert 'max_diffusion_request_seconds_count{state="finished"}' in text
