"""Bodies as other programs really send them, and the pictures they get.

Recorded or read from their sources in November 2025: what an update of theirs sends is
for the next one to find.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from pictures import psnr
from PIL import Image
from serving import Served, served, wait_until

from max_diffusion import TextToImagePipeline
from max_diffusion.engine import EngineConfig

PROMPT = "a red circle above a blue square"
STAINLESS = {
    "Accept": "application/json",
    "User-Agent": "OpenAI/Python 3.57.0",
    "X-Stainless-Lang": "python",
    "X-Stainless-Raw-Response": "true",
    "X-Stainless-Retry-Count": "0",
    "X-Stainless-Read-Timeout": "600",
}


@pytest.fixture(scope="module")
def server(demo: TextToImagePipeline) -> Iterator[Served]:
    with served(demo, max_size=512) as server:
        yield server


def sent(
    server: Served,
    body: dict[str, Any],
    path: str = "/v1/images/generations",
    **headers: str,
) -> dict[str, Any]:
    headers = {"Authorization": "Bearer none", **headers}
    response = httpx.post(server.url + path, json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def size_of(data: str) -> tuple[int, int]:
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return image.size


# LiteLLM 1.110: litellm.image_generation(model="openai/demo", api_base=...).


@pytest.mark.parametrize(
    ("body", "warnings"),
    [
        ({"model": "demo", "prompt": PROMPT, "seed": 7, "steps": 4}, 0),
        (
            {
                "model": "demo",
                "prompt": PROMPT,
                "n": 2,
                "quality": "standard",
                "size": "128x128",
                "user": "me",
            },
            0,
        ),
        (
            {
                "model": "demo",
                "prompt": PROMPT,
                "num_inference_steps": 4,
                "guidance_scale": 3.5,
                "seed": 7,
                "negative_prompt": "x",
            },
            1,
        ),
        (
            {
                "model": "demo",
                "prompt": PROMPT,
                "background": "auto",
                "moderation": "auto",
                "n": 1,
                "output_compression": 100,
                "output_format": "png",
                "quality": "auto",
                "size": "auto",
                "user": "me",
            },
            1,
        ),
        (
            {
                "model": "demo",
                "prompt": PROMPT,
                "n": 1,
                "response_format": "b64_json",
                "size": "128x128",
            },
            0,
        ),
    ],
    ids=["own fields", "dall-e", "diffusers", "gpt-image", "hosted_vllm"],
)
def test_litellm(server: Served, body: dict[str, Any], warnings: int) -> None:
    answer = sent(server, body, **STAINLESS)
    assert [size_of(item["b64_json"]) for item in answer["data"]] == [
        (128, 128)
    ] * body.get("n", 1)
    assert len(answer["max_diffusion"]["warnings"]) == warnings
    steps = body.get("steps", body.get("num_inference_steps", 28))
    assert answer["max_diffusion"]["steps"] == steps


# Open WebUI 0.6, image engine "openai": its own fields, then those of its setting
# "additional parameters"; a query where an API version is set.


@pytest.mark.parametrize(
    ("more", "size"),
    [
        ({"size": "512x512", "response_format": "b64_json"}, (512, 512)),
        ({"size": "auto"}, (128, 128)),
        ({"response_format": "b64_json"}, (128, 128)),
        ({"size": "128x64", "steps": 4, "quality": "auto", "seed": -1}, (128, 64)),
    ],
    ids=["default", "auto", "no size", "parameters"],
)
@pytest.mark.parametrize("query", ["", "?api-version=2024-02-01"])
def test_open_webui(
    server: Served, more: dict[str, Any], size: tuple[int, int], query: str
) -> None:
    body = {"model": "demo", "prompt": PROMPT, "n": 1, "steps": 4, **more}
    users = {
        "X-OpenWebUI-User-Name": "me",
        "X-OpenWebUI-User-Id": "1",
        "X-OpenWebUI-User-Role": "admin",
    }
    answer = sent(server, body, f"/v1/images/generations{query}", **users)
    [item] = answer["data"]
    assert set(item) == {"b64_json"}  # where there was a url, it would be fetched
    assert size_of(item["b64_json"]) == size


def test_open_webui_fetches_an_address(server: Served) -> None:
    """With the headers it asked with, of which a key is one."""
    body = {"model": "demo", "prompt": PROMPT, "n": 1, "steps": 4}
    answer = sent(server, body | {"response_format": "url"})
    headers = {"Authorization": "Bearer none"}
    found = httpx.get(answer["data"][0]["url"], headers=headers)
    assert found.headers["content-type"] == "image/png"


# Clients of the servers whose names of fields are diffusers'.


def test_together_vllm_omni_and_sglang_name_one_picture(server: Served) -> None:
    """Together's fields, vLLM-Omni's and SGLang's draw what ours do."""
    ours = sent(
        server,
        {
            "prompt": PROMPT,
            "size": "128x64",
            "steps": 6,
            "guidance": 2.0,
            "true_cfg": 2.0,
            "negative_prompt": "a star",
            "seed": 3,
        },
    )
    together = {"width": 128, "height": 64, "steps": 6, "guidance_scale": 2.0}
    omni = {"size": "128x64", "num_inference_steps": 6, "guidance_scale": 2.0}
    for fields in (
        {**together, "true_cfg_scale": 2.0, "response_format": "b64_json"},
        {**omni, "true_cfg_scale": 2.0, "response_format": "b64_json"},
        {
            **omni,
            "true_cfg_scale": 2.0,
            "background": "auto",
            "quality": "auto",
            "output_format": "png",
        },
    ):
        body = {"prompt": PROMPT, "n": 1, "seed": 3, "negative_prompt": "a star"}
        theirs = sent(server, body | fields)
        assert theirs["data"] == ours["data"]
        assert theirs["max_diffusion"]["warnings"] == []


# OpenAI's own client, with every field of its own that may be sent.


def test_openais_client_with_all_its_defaults(server: Served) -> None:
    settings: Any = {"base_url": f"{server.url}/v1", "api_key": "none"}
    with openai.OpenAI(**settings, max_retries=0) as client:
        response = client.images.with_raw_response.generate(
            model="demo",
            prompt=PROMPT,
            background="auto",
            moderation="auto",
            n=1,
            output_compression=100,
            output_format="png",
            partial_images=0,
            quality="auto",
            response_format="b64_json",
            safety_identifier="me",
            size="auto",
            stream=False,
            style="vivid",
            user="me",
            extra_body={"seed": 2**64 - 1, "num_inference_steps": 4},
        )
    assert response.headers["x-request-id"]
    images = response.parse()
    assert images.model_extra is not None
    assert images.model_extra["max_diffusion"]["seed"] == 2**64 - 1
    assert images.model_extra["max_diffusion"]["warnings"] == [
        "style: has no effect; describe it in the prompt",
        "moderation: has no effect; nothing is moderated here",
    ]


def test_the_largest_seed_is_that_of_the_pipeline(
    server: Served, demo: TextToImagePipeline
) -> None:
    seed = 2**64 - 1
    answer = sent(server, {"prompt": PROMPT, "seed": seed, "steps": 4})
    alone = demo.generate(PROMPT, seed=seed, num_inference_steps=4).images[0]
    data = base64.b64decode(answer["data"][0]["b64_json"])
    with Image.open(io.BytesIO(data)) as image:
        assert psnr(np.asarray(image.convert("RGB")), alone) >= 60
        assert f"Seed: {seed}," in image.info["parameters"]


def test_a_random_seed_is_told_and_draws_the_same_again(server: Served) -> None:
    body = {"prompt": PROMPT, "steps": 4}
    first = sent(server, body | {"seed": -1})
    again = sent(server, body | {"seed": first["max_diffusion"]["seed"]})
    assert first["data"] == again["data"]


def test_guidance_without_effect_is_told_in_nobodys_names(server: Served) -> None:
    for body, warning in (
        (
            {"negative_prompt": "x"},
            "the negative prompt has no effect unless true guidance is above 1",
        ),
        (
            {"true_cfg": 2.0},
            "true guidance has no effect without a negative prompt; give one, it may "
            "be empty",
        ),
    ):
        answer = sent(server, {"prompt": PROMPT, "steps": 2} | body)
        assert answer["max_diffusion"]["warnings"] == [warning]


def test_a_stream_of_the_engine_waits_aloud(demo: TextToImagePipeline) -> None:
    """Behind another request, in the engine's own queue."""
    config = EngineConfig(max_running=1)
    with served(demo, config, max_steps=9999, keep_alive_seconds=0.1) as server:
        body = {"prompt": PROMPT, "steps": 9999, "stream": True, "progress": True}
        url = f"{server.url}/v1/images/generations"
        with httpx.stream("POST", url, json=body, timeout=60) as first:
            running = first.iter_lines()  # whose end would close the stream
            assert next(running) == "event: image_generation.started"
            with httpx.stream("POST", url, json=body, timeout=60) as second:
                lines = second.iter_lines()
                assert [next(lines) for _ in range(4)] == [": keep-alive", ""] * 2
                assert server.engine.stats().queued == 1
        wait_until(lambda: server.engine.stats().running == 0)
        assert server.engine.stats().queued == 0
