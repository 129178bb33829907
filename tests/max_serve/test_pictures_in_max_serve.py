"""Pictures to start from, and LoRAs, in MAX's own server."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from max.pipelines.request import OpenResponsesRequestBody
from max_serving import PROMPT, Server, as_uri, body, message_of
from pictures import scene
from PIL import Image

from max_diffusion import (
    DenoisingCacheConfig,
    GenerationRequest,
    TextToImagePipeline,
    demo_model_path,
    load_pipeline,
)
from max_diffusion.errors import DeviceError, RequestError
from max_diffusion.pipelines import adapters
from max_diffusion.serving.max_serve.architecture import ImagePipeline, ImageTokenizer
from max_diffusion.serving.max_serve.requests import to_request
from max_diffusion.serving.max_serve.settings import ServeSettings


@pytest.mark.parametrize("strength", [None, 0.3])
def test_a_picture_is_started_from(
    server: Server, demo_pictures: TextToImagePipeline, strength: float | None
) -> None:
    image = scene(96, 80, seed=2)
    given: dict[str, Any] = {"steps": 10, "num_images": 2}
    if strength is not None:
        given["strength"] = strength
    expected = demo_pictures.generate(
        PROMPT,
        image=image,
        strength=strength,
        seed=7,
        num_inference_steps=10,
        num_images_per_prompt=2,
    )
    assert expected.report.num_steps == (6 if strength is None else 3)
    asked = body(input=message_of(as_uri(image)), image=given)
    np.testing.assert_array_equal(server.images(asked), expected.images)


def test_loras_of_the_metadata_draw(
    server: Server, demo: TextToImagePipeline, lora: Path
) -> None:
    adapted = load_pipeline(
        "demo", "cpu", "float32", is_extensible=False, adapters={"style": lora}
    )
    fields = {"image": {"steps": 4}, "metadata": {"lora.style": "0.5"}}
    expected = adapted.generate(
        PROMPT, seed=7, num_inference_steps=4, loras={"style": 0.5}
    )
    np.testing.assert_array_equal(server.images(body(**fields)), expected.images)
    plain = demo.generate(PROMPT, seed=7, num_inference_steps=4).images
    assert (expected.images != plain).any()
    np.testing.assert_array_equal(server.images(body(image={"steps": 4})), plain)


def test_a_lora_that_never_fits_is_refused_at_start(
    demo: TextToImagePipeline, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(
        model_path=str(demo_model_path()),
        device_specs=[SimpleNamespace(device_type="cpu", id=0)],
        quantization_encoding=None,
        huggingface_model_revision=None,
    )
    off = dict.fromkeys(item.name for item in fields(DenoisingCacheConfig))
    config: Any = SimpleNamespace(
        models={"model": model},
        runtime=SimpleNamespace(denoising_cache=SimpleNamespace(**off)),
    )
    monkeypatch.setenv("MAX_DIFFUSION_LORAS", f"style={lora}")
    monkeypatch.setattr(adapters, "free_memory", lambda _: 4000)
    said = r"adapters: the LoRA style changes matrices of \d+ bytes, more than the "
    # What this process could have is nothing to the worker.
    tokenizer = ImageTokenizer("model", config)
    request = GenerationRequest((PROMPT,), loras=(("style", 1.0),))
    context = tokenizer._pipeline.create_context(request)
    assert context.loras == request.loras
    with pytest.raises(RequestError, match=said + "limit of 1000 for LoRAs"):
        ImagePipeline(config, *([None] * 3))  # type: ignore[arg-type]  # not read
    monkeypatch.setattr(adapters, "memory_beside_weights", lambda *_: 999)
    with pytest.raises(DeviceError, match=said + "999 that this machine has"):
        ImagePipeline(config, *([None] * 3))  # type: ignore[arg-type]  # not read
    monkeypatch.setenv("MAX_DIFFUSION_LORA_MEMORY", "1001")
    with pytest.raises(SystemExit, match="^error: max_diffusion: " + said + "limit of"):
        ImageTokenizer("model", config)


SMALL = as_uri(Image.new("RGB", (16, 16)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (message_of(SMALL, SMALL), "at most 1 input_image for this model, got 2"),
        (message_of(SMALL, detail="high"), "detail high of an input_image has no eff"),
        (message_of("data:,red"), "expected an input_image as data:image/png;base64"),
        (message_of("data:image/png;base64,?!"), "the input_image is not base64"),
        (message_of(as_uri(b"GIF89a")), "expected a PNG, JPEG or WebP, got a GIF"),
        (message_of(as_uri(b"\x89PNG\r\n\x1a\n..")), "damaged or cut off"),
        (
            [{"role": "user", "content": message_of(SMALL)[0]["content"][1:]}],
            "expected a message of one input_text, .* got input_image",
        ),
        (
            [{"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}],
            "got input_file",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_pictures_that_cannot_be_started_from_are_answered_400(
    server: Server, content: list[dict[str, Any]], message: str
) -> None:
    answer = server.post(body(input=content))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]["message"]
    assert error.count("\n") == 0
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


def test_more_pictures_than_are_taken_are_not_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("max_diffusion.serving.max_serve.requests.read_inputs", None)
    asked = OpenResponsesRequestBody.model_validate(body(input=message_of(SMALL)))
    with pytest.raises(RequestError, match=r"text alone; .* MAX_DIFFUSION_PICTURES=1"):
        to_request(asked, ServeSettings())
    fields = body(input=message_of(*[SMALL] * 3))
    several = OpenResponsesRequestBody.model_validate(fields)
    with pytest.raises(RequestError, match=r"at most 2 input_image .* got 3"):
        to_request(several, ServeSettings(), 2)
