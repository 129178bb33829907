"""The HTTP interface, over real sockets, by the clients that people use."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from pictures import psnr
from PIL import Image
from serving import Served, served, wait_until

from max_diffusion import TaylorSeerConfig, TextToImagePipeline
from max_diffusion.engine import EngineConfig
from max_diffusion.media.metadata import read_settings

KEY = "sk-test"
PYTHON = re.compile(
    r"\b(guidance_scale|true_cfg_scale|num_inference_steps|num_images_per_prompt|\w+Config"
    r"|run_transformer|create_cache_state|caches at load|tuple|int|None|True|False)\b"
)
"""What only those who call the package know."""
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def server(demo: TextToImagePipeline) -> Iterator[Served]:
    with served(demo, max_size=256, max_prompt_length=1000, max_steps=5000) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    settings: Any = {"base_url": f"{server.url}/v1", "api_key": "none"}
    with openai.OpenAI(**settings, max_retries=0) as client:
        yield client


def picture(data: str | bytes) -> np.ndarray:
    content = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def frames(text: str) -> list[dict[str, Any]]:
    """Events of a stream, whose two lines must agree."""
    found = []
    for block in text.strip().split("\n\n"):
        event = re.fullmatch(r"event: (\S+)\ndata: (.*)", block)
        assert event
        found.append(json.loads(event[2]))
        assert found[-1]["type"] == event[1]
    return found


# OpenAI's own client, unchanged.


def test_openai_client_generates(
    client: openai.OpenAI, demo: TextToImagePipeline
) -> None:
    response = client.images.generate(
        model="demo",
        prompt=PROMPT,
        n=2,
        size="128x64",
        extra_body={"seed": 7, "steps": 12, "cache": "taylorseer"},
    )
    alone = demo.generate(
        PROMPT,
        seed=7,
        width=128,
        height=64,
        num_inference_steps=12,
        num_images_per_prompt=2,
        cache=TaylorSeerConfig(),
    )
    assert response.data is not None
    assert len(response.data) == 2
    for item, wanted in zip(response.data, alone.images, strict=True):
        assert item.b64_json is not None
        assert psnr(picture(item.b64_json), wanted) >= 60
    assert response.size == "128x64"
    assert response.output_format == "png"
    assert response.usage is not None
    assert response.usage.output_tokens == 2 * 32
    assert abs(response.created - time.time()) < 60
    extra = response.model_extra
    assert extra is not None
    assert extra["max_diffusion"]["full_passes"] == alone.report.full_passes
    assert extra["max_diffusion"]["seed"] == 7


def test_openai_client_streams(
    client: openai.OpenAI, demo: TextToImagePipeline
) -> None:
    stream = client.images.generate(
        prompt=PROMPT,
        stream=True,
        partial_images=2,
        extra_body={"seed": 3, "steps": 12},
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    *partial, last = events
    for index, event in enumerate(partial):
        assert isinstance(event, ImageGenPartialImageEvent)
        assert event.partial_image_index == index
    assert isinstance(last, ImageGenCompletedEvent)
    alone = demo.generate(PROMPT, seed=3, num_inference_steps=12).images[0]
    assert psnr(picture(last.b64_json), alone) >= 60
    assert psnr(picture(events[0].b64_json), alone) < 60
    assert last.usage.total_tokens > 0
    assert last.size == "128x128"


def test_openai_client_fetches_by_url(client: openai.OpenAI) -> None:
    response = client.images.generate(
        prompt=PROMPT,
        response_format="url",
        output_format="webp",
        extra_body={"steps": 4, "seed": 1},
    )
    assert response.data is not None
    url = response.data[0].url
    assert url is not None
    fetched = httpx.get(url)
    assert fetched.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(fetched.content)).format == "WEBP"
    assert httpx.get(url[:-8] + "xxx.webp").status_code == 404


def test_openai_client_lists_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "max_diffusion"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")


def test_openai_client_understands_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="multiple of 16") as caught:
        client.images.generate(prompt=PROMPT, size="100x100")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="'dall-e-3' is not served here"):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    wanted = "'auto' or 'standard', got 'hd'; steps and cache set it"
    with pytest.raises(openai.UnprocessableEntityError, match=wanted):
        client.images.generate(prompt=PROMPT, quality="hd")


def test_openai_client_understands_an_error_in_a_stream(
    client: openai.OpenAI, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("kernel exploded")

    monkeypatch.setattr(type(server.engine.pipeline), "decode", fail)
    stream = client.images.generate(prompt=PROMPT, stream=True, extra_body={"steps": 2})
    with pytest.raises(openai.APIError, match="kernel exploded"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="kernel exploded"):
        client.images.generate(prompt=PROMPT, extra_body={"steps": 2})


# Fields of our own.


def test_every_field_reaches_the_picture(
    server: Served, demo: TextToImagePipeline
) -> None:
    response = server.post(
        prompt=PROMPT,
        seed=11,
        steps=10,
        guidance=2.0,
        true_cfg=1.5,
        negative_prompt="a star",
        cache="taylorseer",
        cache_options={"cache_interval": 2, "warmup_steps": 3, "compute_steps": [7]},
        priority=1,
        timeout=60,
        user="me",
        report=True,
    ).json()
    config = TaylorSeerConfig(cache_interval=2, warmup_steps=3, compute_steps=(7,))
    alone = demo.generate(
        PROMPT,
        seed=11,
        num_inference_steps=10,
        guidance_scale=2.0,
        true_cfg_scale=1.5,
        negative_prompt="a star",
        cache=config,
    )
    assert psnr(picture(response["data"][0]["b64_json"]), alone.images[0]) >= 60
    report = response["max_diffusion"]["report"]
    assert report["cache"]["compute_steps"] == [7]
    assert [step["actions"] for step in report["steps"]] == [
        list(step.actions) for step in alone.report.steps
    ]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_come_in_the_format_asked_for_and_say_how_they_were_drawn(
    server: Served, tmp_path: Path, kind: str
) -> None:
    body = {"prompt": PROMPT, "steps": 2, "seed": 1, "output_format": kind}
    if kind != "png":
        body["output_compression"] = 100
    data = server.post(**body).json()["data"][0]["b64_json"]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == kind.upper()
    (tmp_path / "x").write_bytes(base64.b64decode(data))
    settings = read_settings(tmp_path / "x")
    assert settings["prompts"] == [PROMPT]
    assert (settings["model"], settings["seed"], settings["picture"]) == ("demo", 1, 0)
    said = image.info.get("parameters", "")
    if kind != "png":
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        said = comment[8:].decode("utf-16-be")
    assert said.startswith(f"{PROMPT}\nSteps: 2, Sampler: Euler, ")
    assert "prompt" not in image.info
    plain = server.post(prompt=PROMPT, steps=2, seed=1).json()["data"][0]["b64_json"]
    assert psnr(picture(data), picture(plain)) > 25


def test_progress_tells_what_each_step_did(server: Served) -> None:
    response = server.post(
        prompt=PROMPT, steps=12, stream=True, progress=True, cache="auto", n=2
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    events = frames(response.text)
    progress = [e for e in events if e["type"] == "image_generation.progress"]
    assert [event["step"] for event in progress] == list(range(1, 13))
    actions = [event["branches"][0]["actions"] for event in progress]
    assert all(len(both) == 2 for both in actions)
    done = [e for e in events if e["type"] == "image_generation.completed"]
    assert [event["image_index"] for event in done] == [0, 1]
    computed = sum(both.count("compute") for both in actions)
    assert done[0]["max_diffusion"]["full_passes"] == computed


def test_answers_name_the_model_as_it_is_served(demo: TextToImagePipeline) -> None:
    """Not the folder that this machine has it in."""
    with served(demo, model="ours") as server:
        answer = server.post(prompt=PROMPT, steps=2, report=True).json()
        assert answer["max_diffusion"]["report"]["model"] == "ours"
        data = base64.b64decode(answer["data"][0]["b64_json"])
        with Image.open(io.BytesIO(data)) as image:
            assert json.loads(image.info["max_diffusion"])["model"] == "ours"
        stream = frames(server.post(prompt=PROMPT, steps=2, stream=True).text)
        data = base64.b64decode(stream[-1]["b64_json"])
        with Image.open(io.BytesIO(data)) as image:
            assert json.loads(image.info["max_diffusion"])["model"] == "ours"


# What is refused, and how.


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 422, "prompt", "prompt: field required"),
        ({"prompt": ""}, 422, "prompt", "at least 1 character"),
        ({"prompt": "x" * 1001}, 400, "prompt", "at most 1000 characters, got 1001"),
        ({"prompt": "x", "n": 0}, 422, "n", "greater than or equal to 1, got 0"),
        ({"prompt": "x", "n": 11}, 400, "n", "at most 10 pictures, got 11"),
        ({"prompt": "x", "n": "2"}, 422, "n", "valid integer, got '2'"),
        ({"prompt": "x", "n": True}, 422, "n", "valid integer"),
        (
            {"prompt": "x", "size": "64X64"},
            422,
            "size",
            "size: expected WIDTHxHEIGHT in pixels, or auto for the model's own, got "
            "'64X64'",
        ),
        ({"prompt": "x", "size": "512x64"}, 400, "size", "at most 256 pixels a side"),
        ({"prompt": "x", "size": "100x128"}, 400, "width", "nearest: 96 or 112"),
        ({"prompt": "x", "steps": 5001}, 400, "steps", "at most 5000 steps"),
        ({"prompt": "x", "seed": -2}, 422, "seed", "greater than or equal to -1"),
        ({"prompt": "x", "seed": 2**64}, 422, "seed", "equal to 18446744073709551615"),
        ({"prompt": "x", "guidance": -1}, 422, "guidance", "got -1"),
        ({"prompt": "x", "guidance": 1e38}, 422, "guidance", "equal to 100"),
        ({"prompt": "x", "true_cfg": 1e20}, 422, "true_cfg", "equal to 100"),
        ({"prompt": "x", "cache": "foo"}, 400, "cache", "expected none, taylorseer"),
        (
            {"prompt": "x", "cache": "pab"},
            400,
            "cache",
            "cache: pab needs graphs that the model was loaded without; it has those "
            "of none, taylorseer; ask for one that GET /v1/models lists, or start the "
            "server with pab in its --caches",
        ),
        (
            {"prompt": "x", "max_sequence_length": 512},
            400,
            "max_sequence_length",
            "max_sequence_length must be 1 to",
        ),
        (
            {
                "prompt": "x",
                "cache": "taylorseer",
                "cache_options": {"target": "modules"},
            },
            400,
            "cache",
            "start the server with taylorseer:target=modules in its --caches",
        ),
        (
            {"prompt": "x", "cache": "auto", "cache_options": {"warmup_steps": 2.5}},
            400,
            "cache_options",
            "auto: warmup_steps must be a whole number, got 2.5",
        ),
        (
            {"prompt": "x", "cache": "auto", "cache_options": {"compute_steps": 5}},
            400,
            "cache_options",
            "auto: compute_steps must be a list of step indices or a policy, got 5",
        ),
        (
            {"prompt": "x", "cache": "auto", "cache_options": {"speed": 9}},
            400,
            "cache_options",
            "auto has no option 'speed'; it has compute_steps",
        ),
        (
            {"prompt": "x", "cache": "auto", "cache_options": {"tolerance": "low"}},
            400,
            "cache_options",
            "tolerance must be a number",
        ),
        (
            {"prompt": "x", "cache_options": {"tolerance": 1}},
            400,
            "cache_options",
            "of which cache",
        ),
        ({"prompt": "x", "partial_images": 2}, 400, "partial_images", "without stream"),
        ({"prompt": "x", "progress": True}, 400, "progress", "without stream"),
        (
            {"prompt": "x", "output_compression": 9},
            400,
            "output_compression",
            "no effect on png",
        ),
        (
            {"prompt": "x", "stream": True, "response_format": "url"},
            400,
            "response_format",
            "carries the pictures",
        ),
        ({"prompt": "x", "timeout": 0.5}, 422, "timeout", "equal to 1, got 0.5"),
        ({"prompt": "x", "timeout": 601}, 400, "timeout", "at most 600 seconds"),
        ({"prompt": "x", "priority": 9}, 422, "priority", "less than or equal to 8"),
        ({"prompt": "x", "style": "loud"}, 422, "style", "'vivid' or 'natural'"),
        ({"prompt": "x", "moderation": "off"}, 422, "moderation", "'auto' or 'low'"),
        (
            {"prompt": "x", "background": "transparent"},
            422,
            "background",
            "'auto' or 'opaque', got 'transparent'; no picture is transparent",
        ),
        ({"prompt": "x", "quality": "high"}, 422, "quality", "steps and cache set it"),
        ({"prompt": "\ud800"}, 422, "prompt", "prompt"),
    ],
)
def test_a_bad_value_is_named(
    server: Served, body: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    response = httpx.post(
        f"{server.url}/v1/images/generations",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert not PYTHON.search(error["message"])
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 422),
        (b'{"prompt": "x", "prompt', 400),
        (b'{"prompt": NaN}', 422),
        (b"[]", 422),
        (b"null", 422),
        (b"[" * 20_000, 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
    ],
)
def test_a_malformed_body_is_refused(
    server: Served, content: bytes, status: int
) -> None:
    response = httpx.post(
        f"{server.url}/v1/images/generations",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def test_the_wrong_type_of_content_is_named(server: Served) -> None:
    response = httpx.post(
        f"{server.url}/v1/images/generations",
        content=b'{"prompt": "x"}',
        headers={"Content-Type": "text/plain"},
    )
    assert response.status_code == 422
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_the_largest_guidance_still_draws(server: Served) -> None:
    body = {"guidance": 100.0, "true_cfg": 100.0, "negative_prompt": "x", "steps": 20}
    assert server.post(prompt=PROMPT, **body).status_code == 200


def test_a_large_body_is_refused(server: Served) -> None:
    url = f"{server.url}/v1/images/generations"
    large = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    told = httpx.post(url, content=large)
    assert told.status_code == 413
    assert "at most 262144 bytes" in told.json()["error"]["message"]
    untold = httpx.post(url, content=iter([large[:1000]] * 400))
    assert untold.status_code == 413


def test_unknown_paths_and_methods(server: Served) -> None:
    for response, status in (
        (server.get("/v1/nothing"), 404),
        (server.get("/v1/images/generations"), 405),
    ):
        assert response.status_code == status
        assert "GET /docs lists what there is" in response.json()["error"]["message"]


# Keys.


def test_keys(demo: TextToImagePipeline) -> None:
    with served(demo, api_keys=("other", KEY)) as server:
        for path in ("/v1/models", "/v1/models/demo"):
            refused = server.get(path)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert server.post(prompt="x").status_code == 401
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as bad,
            pytest.raises(openai.AuthenticationError, match="is not known"),
        ):
            bad.models.list()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as good:
            assert good.models.list().data
            response = good.images.generate(
                prompt="x", response_format="url", extra_body={"steps": 2}
            )
        assert response.data is not None
        assert httpx.get(str(response.data[0].url)).status_code == 200
        for path in ("/health", "/metrics", "/", "/docs"):
            assert server.get(path).status_code == 200


# Queue, deadlines, clients that leave.


def test_a_full_queue_says_when_to_come_again(demo: TextToImagePipeline) -> None:
    config = EngineConfig(max_running=1, max_queued=0)
    with served(demo, config, max_steps=9999) as server:
        body = {"prompt": PROMPT, "steps": 9999, "stream": True, "progress": True}
        url = f"{server.url}/v1/images/generations"
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            lines = stream.iter_lines()  # whose end would close the stream
            next(lines)
            refused = server.post(prompt=PROMPT)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        wait_until(lambda: server.engine.stats().running == 0)
        assert server.post(prompt=PROMPT, steps=2).status_code == 200


def test_a_deadline(server: Served) -> None:
    late = server.post(prompt=PROMPT, steps=5000, timeout=1)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(
    server: Served, is_stream: bool
) -> None:
    body = json.dumps(
        {"prompt": PROMPT, "steps": 5000, "stream": is_stream, "progress": is_stream}
    )
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n"
            b"Content-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_until(lambda: server.engine.stats().running == 1)
    wait_until(lambda: server.engine.stats().running == 0)
    assert server.engine.stats().reserved_bytes == 0
