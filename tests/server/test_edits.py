"""Bodies of ``POST /v1/images/edits``: what is taken, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from edit_bodies import hole, picture, pixels, png
from openai import BadRequestError, OpenAI
from serving import listening
from sketcher import Sketcher

from max_diffusion.core.pictures import Picture
from max_diffusion.serving.http.errors import ApiError
from max_diffusion.serving.http.forms import read_form, values_of
from max_diffusion.serving.http.schemas import ImageGenerationRequest

PROMPT = "a red circle above a blue square"


@dataclass
class Server:
    """A server whose pictures are functions of the seed."""

    url: str
    sketcher: Sketcher = field(default_factory=Sketcher)

    @property
    def asked(self) -> Any:
        """The last request."""
        return self.sketcher.drawn[-1][0]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    sketcher = Sketcher(inputs=("image", "mask", "strength"))
    with listening(sketcher) as url:
        yield Server(url, sketcher)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def edit(server: Server, files: Any = None, **data: Any) -> httpx.Response:
    """What a client of another kind sends."""
    if files is None:
        files = {"image": ("a.png", png(picture()))}
    data.setdefault("prompt", PROMPT)
    return httpx.post(
        f"{server.url}/v1/images/edits", files=files, data=data, timeout=120
    )


def test_openais_client_brings_a_picture_and_a_mask(
    server: Server, client: OpenAI
) -> None:
    answer = client.images.edit(
        image=("a.png", png(picture())),
        mask=("m.png", png(hole())),
        prompt="12",
        n=2,
        size="96x64",
        extra_body={
            "seed": 2**64 - 1,
            "steps": 8,
            "strength": 0.75,
            "cache": "taylorseer",
            "cache_options": {"warmup_steps": 3, "cache_interval": 2},
        },
    )
    assert answer.data is not None
    assert pixels(answer.data[0].b64_json or "").shape == (16, 16, 3)
    request = server.asked
    assert request.prompts == ("12",)
    assert (request.seed, request.num_images_per_prompt) == (2**64 - 1, 2)
    assert (request.width, request.height, request.num_inference_steps) == (96, 64, 8)
    assert (request.cache.warmup_steps, request.cache.cache_interval) == (3, 2)
    assert request.inputs.images == (Picture(picture()),)
    assert request.inputs.strength == 0.75
    marked = request.inputs.mask.marked(64, 96)
    assert np.array_equal(marked, np.asarray(hole())[..., 3] == 0)


def test_sizes_are_left_to_the_model(server: Server) -> None:
    assert edit(server, size="auto", seed="1").status_code == 200
    assert (server.asked.width, server.asked.height) == (None, None)
    assert server.asked.inputs.strength is None
    # So long that what is drawn of it would be too wide here.
    files = {"image": ("a.png", png(picture(4, 2000)))}
    with listening(Sketcher(inputs=("image",)), max_size=256) as url:
        answer = edit(Server(url), files)
    assert answer.status_code == 400
    assert "size: this server allows at most 256 pixels a side" in answer.text


def test_a_stream_of_openais_client(server: Server, client: OpenAI) -> None:
    events = list(
        client.images.edit(
            image=[("a.png", png(picture()))],  # sent as image[]
            prompt="a",
            stream=True,
            extra_body={"progress": True, "seed": 1},
        )
    )
    kinds = [event.type for event in events]
    assert kinds == [*["image_edit.progress"] * 3, "image_edit.completed"]
    assert pixels(events[-1].b64_json).shape == (16, 16, 3)


IMAGE = ("a.png", png(picture()))


@pytest.mark.parametrize(
    ("files", "data", "status", "said", "param"),
    [
        ({}, {}, 400, "image: a file is required", "image"),
        ({"image": ("a.png", b"some text")}, {}, 400, "got text", "image"),
        ({"image": ("a.png", b"")}, {}, 400, "got an empty file", "image"),
        ({"image": ("a.png", IMAGE[1][:200])}, {}, 400, "damaged or cut", "image"),
        ({"image": IMAGE, "mask": ("m", b"x")}, {}, 400, "mask: expected a", "mask"),
        (
            {"image": IMAGE, "mask": ("m", png(hole(8, 8)))},
            {},
            400,
            "mask must be of the image's size, 96 x 64, got 8 x 8",
            "mask",
        ),
        ([("image[]", IMAGE)] * 2, {}, 400, "image: expected at most 1", "image"),
        (
            [("image", IMAGE), ("mask", IMAGE), ("mask", IMAGE)],
            {},
            400,
            "mask: expected at most 1 here, got 2",
            "mask",
        ),
        ({"image": IMAGE, "markup": IMAGE}, {}, 400, "markup: expected no", "markup"),
        (None, {"strength": "0"}, 422, "strength: input should be greater", "strength"),
        (None, {"strength": "2"}, 422, "less than or equal to 1, got 2", "strength"),
        (None, {"strength": "much"}, 422, "strength: .* got 'much'", "strength"),
        (None, {"steps": "x"}, 422, "steps: .*got 'x'", "steps"),
        (None, {"n": "99"}, 400, "n: this server allows at most 10", "n"),
        (None, {"size": "4096x4096"}, 400, "size: this server allows", "size"),
        (None, {"input_fidelity": "high"}, 422, "strength sets what stays", None),
        (None, {"prompt": ""}, 422, "prompt: ", "prompt"),
        (None, {"image": "text"}, 400, "image: expected a file, got text", "image"),
        (None, {"model": "dall-e-2"}, 404, "is not served here", "model"),
        (None, {"seed": ["1", "2"]}, 400, "seed: is given twice", "seed"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    server: Server, files: Any, data: Any, status: int, said: str, param: str | None
) -> None:
    if files == {}:  # httpx would send no form at all
        files, data = {"x": ("x", b"")}, data
        said = "x: expected no file|image: a file is required"
        param = None
    answer = edit(server, files, **data)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert re.search(said, error["message"]), error
    assert "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param


def test_other_bodies_are_refused(server: Server) -> None:
    url = f"{server.url}/v1/images/edits"
    answer = httpx.post(url, json={"prompt": "a"})
    assert answer.status_code == 422
    assert "expected multipart/form-data" in answer.json()["error"]["message"]
    for kind, body, said in (
        ("multipart/form-data", b"x", "no boundary"),
        ("multipart/form-data; boundary=b", b"x", "it has no end"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--", "no name"),
    ):
        answer = httpx.post(url, content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


def test_variations_say_why_there_are_none(client: OpenAI) -> None:
    with (
        pytest.warns(DeprecationWarning),  # the client's own
        pytest.raises(BadRequestError, match="read text, not pictures"),
    ):
        client.images.create_variation(image=("a.png", png(picture())))


def test_uploads_are_limited_and_may_be_larger_than_other_bodies() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    limits = {"max_body_bytes": 1000, "max_upload_bytes": 150_000}
    with listening(Sketcher(inputs=("image",)), **limits) as url:
        server = Server(url)
        files = {"image": ("a.png", png(noise))}
        answer = edit(server, files, size="16x16", steps="2")
        assert answer.status_code == 200, answer.text
        large = {"image": ("a.png", png(noise) + bytes(60_000))}
        answer = edit(server, large)
        assert answer.status_code == 413
        message = answer.json()["error"]["message"]
        assert "at most 150000 bytes; scale the picture down" in message
        answer = httpx.post(
            f"{server.url}/v1/images/generations",
            files=files,
            data={"prompt": "a"},
        )
        assert answer.status_code == 413


def test_a_server_without_pictures_says_so() -> None:
    with listening(Sketcher()) as url:
        answer = edit(Server(url))
        card = httpx.get(f"{url}/v1/models").json()["data"][0]
    assert answer.status_code == 400
    assert "start it with --pictures" in answer.json()["error"]["message"]
    assert card["inputs"] == []


# Forms, without a server.


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


KIND = 'multipart/form-data; boundary="b"'


def test_a_form_is_taken_apart() -> None:
    name = b'Content-Disposition: form-data; name="%s"'
    data = b"\r\n--c\r\n\0\xff--b\r\n"
    found = read_form(
        KIND,
        b"a preamble\r\n"
        + form(
            name % b"prompt" + b"\r\n\r\nein gr\xc3\xbcnes Herz",
            name % b"loras[]" + b"\r\nContent-Transfer-Encoding: 8bit" + b"\r\n\r\nink",
            name % b"loras[]" + b"\r\n\r\nstyle",
            name % b"image[]" + b'; filename="\xe2\x98\x85.png"\r\n'
            b"Content-Type: image/png\r\n\r\n" + data,
        ),
    )
    assert found.texts == {"prompt": "ein grünes Herz", "loras": ["ink", "style"]}
    assert [(file.field, file.data) for file in found.files] == [("image", data)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "it has no end"),
        (form(b"x")[:-8], "it has no end"),
        (form(b'Content-Disposition: form-data; name="a"'), "a part has no header"),
        (form(b"\r\n\r\nx"), "a part has no name"),
        (
            form(b'Content-Disposition: form-data; name="[]"\r\n\r\nx'),
            r"a part is named \[\], a list of no field; name the field before",
        ),
        (
            form(
                b'Content-Disposition: form-data; name="a"\r\n'
                b"Content-Transfer-Encoding: BASE64\r\n\r\nYQ=="
            ),
            "a part is in 'BASE64'; send its bytes as they are",
        ),
        (form(b"A: " + bytes(9000) + b"\r\n\r\nx"), "at most 8192 bytes a part"),
        (form(*[b"\r\n\r\n"] * 200), "at most 128 parts"),
        (
            form(b'Content-Disposition: form-data; name="a"\r\n\r\n\xff'),
            "a: expected text in UTF-8",
        ),
        *(
            (
                form(
                    b'Content-Disposition: form-data; name="a"\r\n\r\n1',
                    b'Content-Disposition: form-data; name="%s"\r\n\r\n2' % second,
                ),
                "a: is given twice; leave one out",
            )
            for second in (b"a", b"a[]")
        ),
    ],
)
def test_a_malformed_form_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=said):
        read_form(KIND, body)


def test_text_fields_become_what_the_schema_takes() -> None:
    texts: dict[str, str | list[str]] = {
        "prompt": "12",
        "n": "2",
        "stream": "true",
        "true_cfg_scale": "2.5",
        "user": "7",
        "negative_prompt": "",
        "size": "",
        "cache": "taylorseer",
        "cache_options[warmup_steps]": "3",
        "cache_options[phase]": "official",
        "cache_options[compute_steps]": ["0", "4"],
        "loras": ["ink", "2024", '{"name": "1e5", "weight": 2}'],
        "steps": "1e",
        "unknown": "1",
    }
    assert values_of(texts, ImageGenerationRequest) == {
        "prompt": "12",
        "n": 2,
        "stream": True,
        "true_cfg_scale": 2.5,
        "user": "7",
        "negative_prompt": "",
        "cache": "taylorseer",
        "cache_options": {
            **{"warmup_steps": 3, "phase": "official"},
            "compute_steps": [0, 4],
        },
        "loras": ["ink", "2024", {"name": "1e5", "weight": 2}],
        "steps": "1e",
        "unknown": "1",
    }
    text = json.dumps({"warmup_steps": 3})
    assert values_of({"cache_options": text}, ImageGenerationRequest) == {
        "cache_options": {"warmup_steps": 3}
    }


@pytest.mark.parametrize(
    ("in_keys", "key_text", "whole"),
    [
        ("steps[x]", "7", "2"),
        ("prompt[0]", "A", "B"),
        ("prompt[0]", "A", ""),
        ("cache_options[nonsense]", "3", "{}"),
        ("cache_options[cache_interval]", "3", '{"warmup_steps": 2}'),
    ],
)
@pytest.mark.parametrize("is_whole_first", [True, False])
def test_no_field_is_lost_that_is_given_whole_and_in_keys(
    in_keys: str, key_text: str, whole: str, is_whole_first: bool
) -> None:
    name = in_keys.partition("[")[0]
    fields = [(in_keys, key_text), (name, whole)]
    texts = dict(reversed(fields) if is_whole_first else fields)
    with pytest.raises(ApiError, match=f"{name} is given whole, and in keys"):
        values_of(texts, ImageGenerationRequest)
