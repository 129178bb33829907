"""Edits by models that take pictures otherwise, over HTTP and on the page."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from edit_bodies import hole, picture, pixels, png
from openai import OpenAI
from pictures import psnr
from serving import Served, listening, served
from sketcher import Sketcher

from max_diffusion import TextToImagePipeline

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def server(demo_kontext: TextToImagePipeline) -> Iterator[Served]:
    with served(demo_kontext) as server:
        yield server


def edit(url: str, files: Any = None, **data: Any) -> httpx.Response:
    """What a client of another kind sends."""
    if files is None:
        files = {"image": ("a.png", png(picture()))}
    data.setdefault("prompt", PROMPT)
    path = f"{url}/v1/images/edits"
    return httpx.post(path, files=files, data=data, timeout=120)


def test_openais_client_edits_by_a_reference(
    server: Served, demo_kontext: TextToImagePipeline
) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.edit(
            image=("a.png", png(picture())),
            prompt=PROMPT,
            size="64x48",
            extra_body={"seed": 5, "steps": 4, "auto_resize": False},
        )
    assert answer.data is not None
    wanted = demo_kontext.generate(
        PROMPT,
        image=picture(),
        seed=5,
        num_inference_steps=4,
        height=48,
        width=64,
        auto_resize=False,
    )
    drawn = pixels(answer.data[0].b64_json or "")
    assert psnr(drawn, wanted.images[0]) >= 60
    assert answer.usage is not None
    # 64 x 96 pixels were read, in tokens of 16 a side; 48 x 64 were drawn.
    assert answer.usage.input_tokens_details.image_tokens == 4 * 6
    assert answer.usage.output_tokens == 3 * 4


def test_requests_with_and_without_references_run_side_by_side(
    server: Served, demo_kontext: TextToImagePipeline
) -> None:
    sizes = [(64, 96), (96, 64), None, (64, 96), (32, 32)]

    def one(index: int) -> httpx.Response:
        size = sizes[index]
        common = {"seed": index, "steps": 4, "size": "48x48"}
        if size is None:
            return server.post(prompt=PROMPT, **common)
        files = {"image": ("a.png", png(picture(*size)))}
        texts = {name: str(value) for name, value in common.items()}
        return edit(server.url, files, auto_resize="false", **texts)

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(one, range(5)))
    for index, (answer, size) in enumerate(zip(answers, sizes, strict=True)):
        assert answer.status_code == 200, answer.text
        given: dict[str, Any] = {}
        if size is not None:
            given = {"image": picture(*size), "auto_resize": False}
        alone = demo_kontext.generate(
            PROMPT, seed=index, num_inference_steps=4, height=48, width=48, **given
        )
        drawn = pixels(answer.json()["data"][0]["b64_json"])
        assert psnr(drawn, alone.images[0]) >= 60


def test_the_model_says_what_it_takes(server: Served) -> None:
    card = server.get("/v1/models").json()["data"][0]
    assert (card["inputs"], card["needed_inputs"]) == (["image"], [])
    assert card["default_strength"] is None
    assert card["max_pictures"] == 1
    assert {"auto_resize", "max_area"} <= set(card["options"])


def test_what_it_does_not_take_is_refused(server: Served) -> None:
    image = ("a.png", png(picture()))
    masked = {"image": image, "mask": ("m.png", png(hole()))}
    two = [("image[]", image), ("image[]", image)]
    for files, data, said in (
        (masked, {}, "mask is no input of FluxKontextPipeline, which takes image"),
        (None, {"strength": "0.5"}, "strength is no input of FluxKontextPipeline"),
        (two, {}, "image: expected at most 1 here, got 2"),
        (None, {"max_area": "9"}, "max_area of 9 pixels would be less than 16 a side"),
        (None, {"auto_resize": "perhaps"}, "auto_resize"),
    ):
        answer = edit(server.url, files, **data)
        assert answer.status_code in (400, 422)
        assert said in answer.json()["error"]["message"]


def test_limits_are_of_references_too(demo_kontext: TextToImagePipeline) -> None:
    with served(demo_kontext, max_size=512) as server:
        for data, said in (
            ({}, "size: this server allows at most 512 pixels a side, got 1248"),
            ({"size": "64x64", "max_area": "300000"}, "max_area: this server allows"),
            (
                {"size": "64x64", "auto_resize": "false"},
                "image: this server allows at most 262144 pixels without auto_resize",
            ),
        ):
            files = {"image": ("a.png", png(picture(640, 960)))}
            answer = edit(server.url, files, **data)
            assert answer.status_code == 400
            assert said in answer.json()["error"]["message"]


def test_what_a_model_needs_is_asked_for_before_anything_is_decoded() -> None:
    sketcher = Sketcher(
        inputs=("image", "mask", "strength"), needed_inputs=("image", "mask")
    )
    with listening(sketcher) as url:
        answer = edit(url, {"image": ("a.png", b"no picture")})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == (
            "mask: a file is required, a PNG, JPEG or WebP"
        )
        files = {"image": ("a.png", png(picture())), "mask": ("m.png", png(hole()))}
        assert edit(url, files).status_code == 200


def test_pictures_that_are_read_at_their_own_sizes_are_limited() -> None:
    sketcher = Sketcher(inputs=("image",), max_pictures=2, most_read_pixels=64 * 66)
    sizes = {"small": (64, 64), "large": (65, 64), "huge": (640, 640)}
    files = {name: (f"{name}.png", png(picture(*size))) for name, size in sizes.items()}
    small, large, huge = (("image[]", file) for file in files.values())
    limit = "image: this server allows at most 4096 pixels, as it is read at its own"
    with listening(sketcher, max_size=64) as url:
        assert edit(url, [small, small], size="16x16").status_code == 200
        for sent, count in ((large, 4160), (huge, 64 * 66)):
            answer = edit(url, [small, sent], size="16x16")
            assert answer.status_code == 400
            said = answer.json()["error"]["message"]
            assert said.startswith(limit) and said.endswith(f"got {count}")
        answer = edit(url, [small] * 3, size="16x16")
        assert "expected at most 2 here, got 3" in answer.json()["error"]["message"]
