"""Pictures from pictures over HTTP, drawn by the demo model."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from edit_bodies import hole, picture, pixels, png
from pictures import psnr
from serving import Served, served, wait_until

from max_diffusion import GenerationRequest, TextToImagePipeline
from max_diffusion.engine import EngineConfig, StepTaken

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def server(demo_pictures: TextToImagePipeline) -> Iterator[Served]:
    with served(demo_pictures) as server:
        yield server


def edit(server: Served, files: Any = None, **data: Any) -> httpx.Response:
    """What a client of another kind sends."""
    if files is None:
        files = {"image": ("a.png", png(picture()))}
    data.setdefault("prompt", PROMPT)
    return httpx.post(
        f"{server.url}/v1/images/edits", files=files, data=data, timeout=120
    )


def test_a_picture_is_as_the_pipeline_draws_it(
    server: Served, demo_pictures: TextToImagePipeline
) -> None:
    answer = edit(server, seed="5", steps="6", strength="0.5")
    assert answer.status_code == 200, answer.text
    wanted = demo_pictures.generate(
        PROMPT, image=picture(), strength=0.5, seed=5, num_inference_steps=6
    )
    drawn = pixels(answer.json()["data"][0]["b64_json"])
    assert answer.json()["size"] == "96x64"  # the picture's own
    assert psnr(drawn, wanted.images[0]) >= 60


def test_requests_with_and_without_pictures_run_side_by_side(
    server: Served, demo_pictures: TextToImagePipeline
) -> None:
    masked = {
        "image": ("a.png", png(picture(128, 128))),
        "mask": ("m.png", png(hole(128, 128))),
    }

    def one(index: int) -> httpx.Response:
        if index % 3 == 2:
            return server.post(prompt=PROMPT, seed=index, steps=6)
        files = masked if index % 3 else {"image": masked["image"]}
        return edit(server, files, seed=str(index), steps="6", strength="0.8")

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(one, range(6)))
    for index, answer in enumerate(answers):
        given: dict[str, Any] = {}
        if index % 3 != 2:
            given = {"image": picture(128, 128), "strength": 0.8}
        if index % 3 == 1:
            given["mask"] = hole(128, 128)
        alone = demo_pictures.generate(
            PROMPT, seed=index, num_inference_steps=6, **given
        )
        drawn = pixels(answer.json()["data"][0]["b64_json"])
        assert psnr(drawn, alone.images[0]) >= 60


def test_the_model_says_what_it_takes(server: Served) -> None:
    card = server.get("/v1/models").json()["data"][0]
    assert card["inputs"] == ["image", "mask", "strength"]


def test_a_size_that_cannot_be_drawn_is_refused(server: Served) -> None:
    answer = edit(server, size="100x100")
    assert answer.status_code == 400
    assert "must be a multiple of 16" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", ["false", "true"])
def test_neither_an_upload_nor_its_pixels_are_held_while_it_waits(
    demo_pictures: TextToImagePipeline, stream: str
) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (1024, 1024, 3), np.uint8)
    upload = png(noise)  # of as many bytes, since noise cannot be compressed
    assert len(upload) > noise.nbytes > 3e6
    files = {"image": ("a.png", upload)}
    with (
        served(demo_pictures, EngineConfig(max_running=1)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        first = server.engine.submit(
            GenerationRequest(("a",), num_inference_steps=10_000, height=256, width=256)
        )
        next(event for event in first.events(60) if isinstance(event, StepTaken))
        tracemalloc.start()
        try:
            answer = pool.submit(
                edit, server, files, size="64x64", steps="2", stream=stream
            )
            wait_until(lambda: server.engine.stats().queued == 1)
            wait_until(lambda: gc.collect() >= 0 and held() < noise.nbytes / 2)
        finally:
            tracemalloc.stop()
            first.cancel()
        assert answer.result().status_code == 200


def held() -> int:
    """Bytes that Python and NumPy hold of those asked for since it is traced."""
    return tracemalloc.get_traced_memory()[0]
