"""The pipelines in MAX's own server: ``max serve`` really runs, on loopback."""

from __future__ import annotations

import base64
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from cogvideox_folder import make_cogvideox_folder
from folders import TEST_GRAPHS
from max.pipelines.request import OpenResponsesRequestBody
from max_serving import PROMPT, SECONDS, Server, as_uri, body, message_of, serving
from PIL import Image
from processes import run_python

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    GenerationRequest,
    StepMaskConfig,
    TaylorSeerConfig,
    TextToImagePipeline,
    load_pipeline,
)
from max_diffusion.core.grid import Frames
from max_diffusion.core.pictures import Picture, PictureInputs
from max_diffusion.errors import RequestError
from max_diffusion.pipelines.families import PIPELINES
from max_diffusion.serving.max_serve import ARCHITECTURES
from max_diffusion.serving.max_serve.architecture import ImageTokenizer
from max_diffusion.serving.max_serve.requests import (
    check_kind,
    from_json,
    pixel_options,
    to_json,
    to_request,
)
from max_diffusion.serving.max_serve.settings import ServeSettings


def test_picture_equals_ours(server: Server, demo: TextToImagePipeline) -> None:
    expected = demo.generate(PROMPT, seed=7).images
    np.testing.assert_array_equal(server.images(body()), expected)


def test_fields_of_max_reach_the_pipeline(
    server: Server, demo: TextToImagePipeline
) -> None:
    image = {
        "height": 144,
        "width": 160,
        "steps": 6,
        "guidance_scale": 2.0,
        "true_cfg_scale": 3.0,
        "negative_prompt": "a green star",
        "secondary_prompt": "two purple hearts",
        "secondary_negative_prompt": "a star",
        "num_images": 2,
    }
    metadata = {"max_sequence_length": "20"}
    expected = demo.generate(
        PROMPT,
        height=144,
        width=160,
        num_inference_steps=6,
        guidance_scale=2.0,
        true_cfg_scale=3.0,
        prompt_2="two purple hearts",
        negative_prompt="a green star",
        negative_prompt_2="a star",
        max_sequence_length=20,
        num_images_per_prompt=2,
        seed=7,
    ).images
    answer = server.images(body(image=image, metadata=metadata))
    np.testing.assert_array_equal(answer, expected)


def test_cache_of_the_metadata_draws(server: Server, demo: TextToImagePipeline) -> None:
    metadata = {
        "cache": "taylorseer",
        "cache_option.cache_interval": "3",
        "cache_option.compute_steps": "[0, 20, 27]",
        "cache_option.phase": "official",
        "cache_option.warmup_steps": "4",
    }
    config = TaylorSeerConfig(3, 4, phase="official", compute_steps=(0, 20, 27))
    images = server.images(body(metadata=metadata))
    np.testing.assert_array_equal(
        images, demo.generate(PROMPT, seed=7, cache=config).images
    )
    assert (images != demo.generate(PROMPT, seed=7, cache="none").images).any()


def test_schedule_of_the_metadata_draws(
    server: Server, demo: TextToImagePipeline
) -> None:
    metadata = {"sigmas": "[1.0, 0.8, 0.5, 0.2]"}
    expected = demo.generate(PROMPT, seed=7, sigmas=(1.0, 0.8, 0.5, 0.2)).images
    np.testing.assert_array_equal(server.images(body(metadata=metadata)), expected)


def test_a_message_is_a_prompt(server: Server) -> None:
    message = {
        "role": "user",
        "content": [{"type": "input_text", "text": PROMPT}],
    }
    image = {"steps": 4}
    np.testing.assert_array_equal(
        server.images(body(input=[message], image=image)),
        server.images(body(image=image)),
    )


def test_requests_leave_nothing_to_those_after_them(server: Server) -> None:
    plain = body(image={"steps": 12})
    cached = body(image={"steps": 12}, metadata={"cache": "taylorseer"})
    first = server.images(plain)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(server.images, [cached, plain, cached, plain]))
    np.testing.assert_array_equal(others[0], others[2])
    np.testing.assert_array_equal(others[1], first)
    np.testing.assert_array_equal(others[3], first)


def test_without_a_seed_pictures_differ(server: Server) -> None:
    fields = body(image={"steps": 4})
    del fields["seed"]
    assert (server.images(fields) != server.images(fields)).any()


@pytest.mark.parametrize(("asked", "file_format"), [(None, "JPEG"), ("webp", "WEBP")])
def test_other_formats_are_near(
    server: Server, demo: TextToImagePipeline, asked: str | None, file_format: str
) -> None:
    fields = body(image={"steps": 8})
    del fields["provider_options"]["image"]["output_format"]
    if asked is not None:
        fields["provider_options"]["image"]["output_format"] = asked
    (file,) = server.files(fields)
    expected = demo.generate(PROMPT, seed=7, num_inference_steps=8).images[0]
    assert file.format == file_format
    difference = np.abs(np.asarray(file).astype(int) - expected)
    assert 0 < difference.mean() < 8  # lossy, but this picture and no other


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metadata": {"cahce": "none"}}, "metadata: expected cache, .*got 'cahce'"),
        (
            {"metadata": {"true_cfg_scale": "2"}},
            "'true_cfg_scale'; it is a field of provider_options.image",
        ),
        ({"metadata": {"cache": "nope"}}, "cache: expected none, .*got 'nope'"),
        (
            {"metadata": {"cache": "first-block"}},
            "start the server with first-block in MAX_DIFFUSION_CACHES",
        ),
        (
            {"metadata": {"cache": "taylorseer", "cache_option.speed": "3"}},
            "taylorseer has no option 'speed'; it has",
        ),
        (
            {"metadata": {"cache": "taylorseer", "cache_option.cache_interval": "x"}},
            "taylorseer: cache_interval must be a whole number, got 'x'",
        ),
        (
            {"metadata": {"cache": "taylorseer", "cache_option.compute_steps": "[99]"}},
            "compute_steps names step 99, but the last of 28 is 27",
        ),
        ({"metadata": {"cache_option.cache_interval": "3"}}, "of which cache"),
        (
            {"metadata": {"cache": "taylorseer", "cache_memory_limit": "10"}},
            "more than the limit of 10",
        ),
        ({"metadata": {"sigmas": "0.5"}}, "sigmas must be numbers such as"),
        ({"metadata": {"sigmas": "[0.5, 0.9]"}}, "sampling: "),
        ({"image": {"width": 136}}, "width must be a multiple of 16 pixels"),
        ({"image": {"width": 4096}}, "width: this server allows at most 2048"),
        ({"image": {"steps": 61}}, "steps: this server allows at most 60"),
        ({"image": {"output_format": "gif"}}, "expected jpeg, png, webp, got 'gif'"),
        ({"image": {"strength": 0.3}}, "strength: has no effect without an input_ima"),
        ({"metadata": {"lora.ink": "1"}}, "'ink' is not known here, there are style"),
        ({"metadata": {"lora.style": "much"}}, "weight of 'style' must be a .*number"),
        ({"metadata": {"lora.style": "101"}}, "weight of 'style' must be -100 to 100"),
        ({"seed": 2**64}, "seed must be in"),
        ({"n": 2}, "n: has no effect here; .*num_images"),
        ({"temperature": 0.5}, "temperature: has no effect here"),
        ({"input": []}, "input: expected text"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_drawn_is_answered_400(
    server: Server, fields: dict[str, Any], message: str
) -> None:
    answer = server.post(body(**fields))
    assert answer.status_code == 400, answer.text
    with pytest.raises(ValueError, match=message):
        raise ValueError(answer.json()["error"]["message"])


# The last that asks the server.
def test_sigterm_ends_server_and_workers(server: Server) -> None:
    server.process.terminate()
    server.process.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(server.process.pid, 0)
            time.sleep(0.1)


def means(frames: np.ndarray) -> np.ndarray:
    count, height, width, _ = frames.shape
    cells = frames.reshape(count, height // 8, 8, width // 8, 8, 3)
    return cells.astype(float).mean(axis=(2, 4))


def test_a_video_is_drawn(tmp_path: Path) -> None:
    model = make_cogvideox_folder(tmp_path / "model", "5b")
    graphs = TEST_GRAPHS / "cogvideox"
    own: dict[str, Any] = {
        "seed": 3,
        "num_inference_steps": 3,
        "height": 32,
        "width": 48,
        "num_frames": 9,
    }
    video = {
        "steps": 3,
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "frames_per_second": 8,
        "response_format": "b64_json",
    }
    fields = body(
        seed=3,
        provider_options={"video": video},
        metadata={"cache": "taylorseer"},
    )
    pipeline = load_pipeline(model, "cpu", precompiled=[graphs])
    wanted = pipeline.generate(PROMPT, cache="taylorseer", **own).frames[0]
    limits = {"PRECOMPILED": str(graphs), "MAX_FRAMES": "13"}
    with serving(model, tmp_path, limits) as server:
        answer = server.post(fields)
        assert answer.status_code == 200, answer.text
        (content,) = answer.json()["output"][0]["content"]
        assert (content["num_frames"], content["frames_per_second"]) == (9, 8)
        file = io.BytesIO(base64.b64decode(content["video_data"]))
        with av.open(file, "r") as container:
            frames = np.stack(
                [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
            )
        assert frames.shape == wanted.shape
        # A video of noise keeps no more than its means over 8 x 8 pixels.
        error = np.abs(means(frames) - means(wanted)).mean()
        other = np.abs(means(frames[::-1]) - means(wanted)).mean()
        assert error < 0.3 * other
        long = {"video": video | {"num_frames": 17}}
        refused = server.post({**fields, "provider_options": long})
        assert refused.status_code == 400
        said = refused.json()["error"]["message"]
        assert "num_frames: this server allows at most 13 frames, got 17" in said
        image = server.post({**fields, "provider_options": {"image": {}}})
        assert image.status_code == 400
        assert "with provider_options.video" in image.json()["error"]["message"]
        start = message_of(as_uri(Image.new("RGB", (16, 16))))
        refused = server.post({**fields, "input": start})
        assert refused.status_code == 400
        assert "draws from text alone" in refused.json()["error"]["message"]


def video_asked(**options: Any) -> OpenResponsesRequestBody:
    fields = body() | {"provider_options": {"video": options}}
    return OpenResponsesRequestBody.model_validate(fields)


def test_options_of_a_video_are_the_requests() -> None:
    asked = video_asked(num_frames=9, frames_per_second=12, steps=4, height=96)
    request = to_request(asked, ServeSettings())
    assert request.options == {"num_frames": 9, "fps": 12}
    assert (request.num_inference_steps, request.height, request.width) == (4, 96, None)
    assert to_request(video_asked(), ServeSettings()).options == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video": {}, "image": {}}, "expected image or video, got both"),
        ({"video": {"guidance_scale_2": 2}}, "video.guidance_scale_2: has no effect"),
        ({"audio": {}}, "provider_options.audio: .*; leave it out"),
    ],
)
def test_options_of_no_effect_are_refused(fields: Any, message: str) -> None:
    asked = OpenResponsesRequestBody.model_validate(body(provider_options=fields))
    with pytest.raises(RequestError, match=message):
        to_request(asked, ServeSettings())


def test_frames_in_the_metadata_are_refused_where_max_has_a_field() -> None:
    fields = body(metadata={"num_frames": "9"}) | {"provider_options": {"video": {}}}
    asked = OpenResponsesRequestBody.model_validate(fields)
    with pytest.raises(RequestError, match="it is num_frames of provider_options"):
        to_request(asked, ServeSettings())


@pytest.mark.parametrize(
    ("options", "frames", "message"),
    [
        ({"image": {}}, Frames(17, 5, 8.0), "a video of 17 frames; ask for it with"),
        ({"video": {}}, Frames(), "an image of one frame"),
        ({"video": {}}, Frames(17, 5, 8.0), "MAX writes 16 .* have 8; give"),
        ({"image": {}}, Frames(), None),
        ({"video": {}}, Frames(17, 5, 16.0), None),
        ({"video": {"frames_per_second": 8}}, Frames(17, 5, 8.0), None),
    ],
)
def test_kinds_are_told_apart(
    options: Any, frames: Frames, message: str | None
) -> None:
    asked = OpenResponsesRequestBody.model_validate(body(provider_options=options))
    if message is None:
        check_kind(pixel_options(asked), frames)
        return
    with pytest.raises(RequestError, match=message):
        check_kind(pixel_options(asked), frames)


def parsed(**fields: Any) -> GenerationRequest:
    return to_request(
        OpenResponsesRequestBody.model_validate(body(**fields)), ServeSettings()
    )


def test_every_pipeline_has_an_architecture() -> None:
    assert [architecture.name for architecture in ARCHITECTURES] == list(PIPELINES)


def test_what_is_not_given_stays_the_models_default() -> None:
    fields = body()
    del fields["provider_options"]
    request = to_request(
        OpenResponsesRequestBody.model_validate(fields), ServeSettings()
    )
    assert request == GenerationRequest(prompts=(PROMPT,), seed=7)


def test_guidance_is_the_models_default_unless_given() -> None:
    # MAX's own default would be a warning on models without guidance embedding.
    assert parsed().guidance_scale is None
    assert parsed(image={"guidance_scale": 3.5}).guidance_scale == 3.5


def test_metadata_that_is_too_long_is_refused() -> None:
    with pytest.raises(RequestError, match="at most 32000 characters"):
        parsed(metadata={"sigmas": "[1.0" + " " * 32_000 + "]"})


@pytest.mark.parametrize(
    "cache",
    [
        None,
        *(kind() for kind in CACHES.values()),
        TaylorSeerConfig(3, 4, 2, phase="absolute", compute_steps=(0, 5)),
        StepMaskConfig(compute_steps="fast", compute_last=2),
    ],
    ids=str,
)
def test_requests_cross_to_the_worker_whole(cache: AbstractCacheConfig | None) -> None:
    request = GenerationRequest(
        prompts=("Ein Kreis \u2014 rot", ""),
        prompt_2=("x", "y"),
        negative_prompt=("", "z"),
        negative_prompt_2="",
        height=128,
        num_inference_steps=9,
        guidance_scale=0.1,
        true_cfg_scale=1 / 3,
        seed=2**64 - 1,
        seeds=(1, -2, 2**64 - 1, 4, 5, 6),
        options={"max_sequence_length": 7},
        num_images_per_prompt=3,
        sigmas=(1.0, 0.1 + 0.2),
        cache=cache,
        cache_memory_limit=2**40,
        loras=(("style", 0.1 + 0.2), ("ink", -1.0)),
        is_timed=True,
    )
    assert from_json(to_json(request)) == request
    pixels = np.random.default_rng(3).integers(0, 256, (5, 7, 3), np.uint8)
    inputs = PictureInputs((Picture(pixels),), strength=0.1 + 0.2)
    request = replace(request, inputs=inputs)
    assert from_json(to_json(request), [pixels]) == request


def test_settings_come_from_the_environment() -> None:
    assert ServeSettings.from_environment({"HOME": "x"}) == ServeSettings()
    given = {"MAX_DIFFUSION_CACHES": "none, first-block", "MAX_DIFFUSION_MAX_N": "3"}
    read = ServeSettings.from_environment(given)
    caches = (CACHES["none"](), CACHES["first-block"]())
    assert read == ServeSettings(caches=caches, max_n=3)
    read = ServeSettings.from_environment({"MAX_DIFFUSION_CACHES": "all"})
    assert read.caches == tuple(kind() for kind in CACHES.values())
    given = {
        "MAX_DIFFUSION_PRECOMPILED": "/one,two",
        "MAX_DIFFUSION_REQUIRE_PRECOMPILED": "1",
    }
    read = ServeSettings.from_environment(given)
    assert (read.precompiled, read.require_precompiled) == (("/one", "two"), 1)
    read = ServeSettings.from_environment({"MAX_DIFFUSION_LORAS": "a=x,b=/y=z"})
    assert read.loras == {"a": "x", "b": "/y=z"}
    given = {"MAX_DIFFUSION_LORAS": "a=x", "MAX_DIFFUSION_LORA_MEMORY": "9"}
    assert ServeSettings.from_environment(given).lora_memory == 9
    with pytest.raises(
        RequestError, match="MAX_DIFFUSION_LORA_MEMORY must be at least"
    ):
        ServeSettings(loras={"a": "x"}, lora_memory=0)
    assert ServeSettings.from_environment({"MAX_DIFFUSION_PICTURES": "1"}).pictures == 1
    text = "none,taylorseer:target=modules"
    read = ServeSettings.from_environment({"MAX_DIFFUSION_CACHES": text})
    assert read.caches == (CACHES["none"](), TaylorSeerConfig(target="modules"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("CACHES", "none,nope", "MAX_DIFFUSION_CACHES: expected all, .*got 'nope'"),
        ("CACHES", "", "MAX_DIFFUSION_CACHES: expected all, .*got ''"),
        ("MAX_N", "many", "MAX_DIFFUSION_MAX_N: expected a whole number, got 'many'"),
        ("MAX_STEPS", "0", "MAX_DIFFUSION_MAX_STEPS must be at least 1"),
        ("PICTURES", "2", "MAX_DIFFUSION_PICTURES must be at most 1, got 2"),
        ("LORAS", "style", "MAX_DIFFUSION_LORAS: expected NAME=FILE .* got 'style'"),
        (
            "LORA_MEMORY",
            "9",
            "MAX_DIFFUSION_LORA_MEMORY: has no .* MAX_DIFFUSION_LORAS",
        ),
        ("LORAS", "a=x,a=y", "MAX_DIFFUSION_LORAS: 'a' names two files, x and y"),
        ("REQUIRE_PRECOMPILED", "2", "_REQUIRE_PRECOMPILED must be .* 1, got 2"),
        ("REQUIRE_PRECOMPILED", "yes", "expected a whole number, got 'yes'"),
    ],
)
def test_bad_settings_are_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ServeSettings.from_environment({f"MAX_DIFFUSION_{name}": text})


def test_a_server_that_cannot_start_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAX_DIFFUSION_CACHES", "nope")
    config: Any = None  # not read before the settings
    with pytest.raises(SystemExit, match=r"^error: max_diffusion: MAX_"):
        ImageTokenizer("model", config)


def test_the_package_alone_leaves_max_pipelines_out() -> None:
    found = run_python(
        "import sys, max_diffusion, max_diffusion.plugins, max_diffusion.cli.main\n"
        "print([n for n in sys.modules if n.startswith('max.pipelines') "
        "or n.startswith('max_diffusion.serving.max_serve')])"
    )
    assert found.stdout == "[]\n", found.stderr


def test_without_maxs_server_the_import_says_what_to_install() -> None:
    found = run_python(
        "import sys\n"
        "sys.modules['max.pipelines'] = None\n"
        "try:\n"
        "    import max_diffusion.serving.max_serve\n"
        "except ImportError as err:\n"
        "    print(err)"
    )
    assert found.stdout.count("\n") == 1, found.stderr
    assert 'pip install "max[serve]' in found.stdout
