"""What a server tells of itself: health, metrics, documents, pages."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from serving import Served, served

from max_diffusion import CACHES, TextToImagePipeline
from max_diffusion.caches import Action
from max_diffusion.serving.http import LocalBackend, ServerSettings, create_app
from max_diffusion.serving.http.backend import ModelDescription
from max_diffusion.serving.http.desk import to_request
from max_diffusion.serving.http.schemas import ImageGenerationRequest

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def server(demo: TextToImagePipeline) -> Iterator[Served]:
    with served(demo, max_size=256, max_prompt_length=1000, max_steps=5000) as server:
        yield server


def test_metrics_count_what_was_done(server: Served) -> None:
    def value(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    text = server.get("/metrics").text
    names = (
        'max_diffusion_steps_total{action="compute",cache="step-mask"}',
        'max_diffusion_steps_total{action="predict",cache="step-mask"}',
        'max_diffusion_request_seconds_count{state="finished"}',
        "max_diffusion_turn_seconds_count",
        "max_diffusion_turn_samples_sum",
    )
    before = [value(name) for name in names]
    response = server.post(
        prompt=PROMPT,
        steps=9,
        cache="step-mask",
        cache_options={"compute_steps": [0, 4]},
    )
    assert response.status_code == 200
    text = server.get("/metrics").text
    after = [value(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 7, 1, 3, 3]
    assert value("max_diffusion_queued_requests") == 0
    assert value("max_diffusion_compile_seconds") > 0
    assert value("max_diffusion_batch_samples_count") > 0
    assert value("max_diffusion_memory_limit_bytes") > 0


def test_health_and_loading(demo: TextToImagePipeline) -> None:
    import asyncio

    async def ask() -> None:
        backend = LocalBackend()
        transport = httpx.ASGITransport(create_app(backend, ServerSettings()))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x"
        ) as client:
            assert (await client.get("/health/live")).status_code == 200
            for path in ("/health", "/health/ready"):
                response = await client.get(path)
                assert response.status_code == 503
                assert response.json()["status"] == "loading"
            for response in (
                await client.get("/v1/models"),
                await client.post("/v1/images/generations", json={"prompt": "x"}),
            ):
                assert response.status_code == 503
                assert response.headers["retry-after"]
                assert response.json()["error"]["code"] == "loading"

    asyncio.run(ask())


def test_a_draining_server_refuses(demo: TextToImagePipeline) -> None:
    with served(demo) as server:
        server.backend.drain()
        assert server.get("/health").json()["status"] == "draining"
        refused = server.post(prompt=PROMPT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"


def test_the_document_describes_the_api(server: Served) -> None:
    document = server.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/videos",
        "/v1/videos/{video_id}",
        "/v1/videos/{video_id}/content",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
    }
    fields = document["components"]["schemas"]["ImageGenerationRequest"]["properties"]
    assert {"prompt", "n", "size", "seed", "cache", "cache_options"} <= set(fields)


def test_the_pages_ask_nobody_else(server: Served) -> None:
    for path in ("/", "/docs"):
        page = server.get(path)
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text)


def test_the_page_shows_what_the_caches_say(server: Served) -> None:
    page = server.get("/").text
    for action in Action:
        assert f'{action.value}: ["{action.letter}", "{action.words}"]' in page
        assert f"--{action.value}: {action.colour}" in page
    (card,) = server.get("/v1/models").json()["data"]
    assert card["cache_summaries"] == {n: CACHES[n].summary for n in card["caches"]}
    assert not [s for s in card["cache_summaries"].values() if s in page]


def test_steps_that_nobody_gave_are_the_models(demo: TextToImagePipeline) -> None:
    body = ImageGenerationRequest(prompt=PROMPT)
    model = ModelDescription.of(demo)
    request = to_request(body, ServerSettings(), model)
    assert request.num_inference_steps is None
    request = to_request(body, ServerSettings(max_steps=5), model)
    assert request.num_inference_steps == 5
