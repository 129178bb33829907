"""Fields by which clients ask: OpenAI's, ours, and those of other servers."""

from __future__ import annotations

import base64
import io
import json
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from openai.types.image_generate_params import (
    ImageGenerateParamsBase,
    ImageGenerateParamsStreaming,
)
from painters import picture_of
from PIL import Image
from sketcher import asked, post

from max_diffusion.serving.http.bodies import ALIASES, field_names
from max_diffusion.serving.http.schemas import OTHERS, ImageGenerationRequest

PROMPT = {"prompt": "a red circle"}


def error_of(body: dict[str, Any], status: int = 422) -> dict[str, Any]:
    response = post(PROMPT | body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    return error


# OpenAI's.


@pytest.mark.parametrize(
    "body",
    [
        {"quality": "auto"},
        {"quality": "standard"},
        {"background": "auto"},
        {"background": "opaque"},
        {"output_compression": 100},
        {"output_compression": 100, "output_format": "png"},
        {"user": "me"},
        {"safety_identifier": "me"},
        {"user": "me", "safety_identifier": "you"},
        {"size": "auto", "n": 1, "stream": False, "partial_images": 0},
        {"response_format": "b64_json", "output_format": "png"},
        {"input_fidelity": None, "svg": None, "style": None, "seed": None},
        dict.fromkeys(ImageGenerationRequest.model_fields.keys() - {"prompt"}),
    ],
)
def test_what_changes_nothing_is_taken_without_a_word(body: dict[str, Any]) -> None:
    request, answer = asked(PROMPT | body)
    plain, _ = asked(PROMPT)
    assert request == type(request)(**vars(plain) | {"seed": request.seed})
    assert answer["max_diffusion"]["warnings"] == []


@pytest.mark.parametrize(
    ("body", "warnings"),
    [
        ({"style": "vivid"}, ["style: has no effect; describe it in the prompt"]),
        ({"style": "natural"}, ["style: has no effect; describe it in the prompt"]),
        (
            {"moderation": "auto"},
            ["moderation: has no effect; nothing is moderated here"],
        ),
        (
            {"moderation": "low", "style": "vivid"},
            [
                "style: has no effect; describe it in the prompt",
                "moderation: has no effect; nothing is moderated here",
            ],
        ),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_has_no_effect_is_told(
    body: dict[str, Any], warnings: list[str], is_stream: bool
) -> None:
    response = post(PROMPT | body | {"stream": is_stream})
    assert response.status_code == 200
    if is_stream:
        text = response.text
        for warning in warnings:
            assert f'"{warning}"' in text
    else:
        assert response.json()["max_diffusion"]["warnings"] == warnings


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *(
            (
                {"quality": quality},
                f"quality: input should be 'auto' or 'standard', got '{quality}'; "
                "steps and cache set it",
            )
            for quality in ("hd", "low", "medium", "high", "xhigh", "max")
        ),
        (
            {"background": "transparent"},
            "background: input should be 'auto' or 'opaque', got 'transparent'; no "
            "picture is transparent",
        ),
        (
            {"output_format": "gif"},
            "output_format: input should be 'png', 'jpeg' or 'webp', got 'gif'",
        ),
        (
            {"frame_count": 9},
            "frame_count: no such field; pictures do not move here; GET /docs lists "
            "them",
        ),
        (
            {"input_fidelity": "high"},
            "input_fidelity: no such field; at /v1/images/edits strength sets what "
            "stays; GET /docs lists them",
        ),
        (
            {"extra_body": {"seed": 1}},
            "extra_body: no such field; its fields go beside prompt; GET /docs lists "
            "them",
        ),
        ({"n": True}, "n: input should be a valid integer, got true"),
        ({"prompt": None}, "prompt: input should be a valid string, got null"),
        (
            {"cache_options": [1]},
            "cache_options: input should be a valid dictionary, got [1]",
        ),
    ],
)
def test_what_asks_for_something_else_is_refused(
    body: dict[str, Any], message: str
) -> None:
    error = error_of(body)
    assert error["message"] == message
    assert error["param"] == next(iter(body))


def test_every_field_of_openais_client_is_known() -> None:
    """Those of its next version as well: this fails when one is added."""
    known = {*field_names(ImageGenerationRequest), *OTHERS}
    for kind in (ImageGenerateParamsBase, ImageGenerateParamsStreaming):
        assert set(get_type_hints(kind)) <= known


@pytest.mark.parametrize("name", ["quality", "style", "moderation", "background"])
def test_every_value_of_openais_client_is_taken_or_refused_by_name(name: str) -> None:
    hint = get_type_hints(ImageGenerateParamsBase)[name]
    values = [value for part in get_args(hint) for value in get_args(part) if value]
    assert len(values) >= 2
    for value in values:
        response = post(PROMPT | {name: value})
        assert response.status_code in (200, 422)
        if response.status_code == 422:
            assert response.json()["error"]["param"] == name


# Seeds.


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_seeds_are_those_of_the_command_line(seed: int) -> None:
    request, answer = asked(PROMPT | {"seed": seed})
    assert request.seed == seed
    assert answer["max_diffusion"]["seed"] == seed
    data = base64.b64decode(answer["data"][0]["b64_json"])
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), picture_of(seed))


def test_minus_one_is_a_random_seed_which_is_told() -> None:
    told = set()
    for _ in range(4):
        request, answer = asked(PROMPT | {"seed": -1})
        assert 0 <= request.seed == answer["max_diffusion"]["seed"] < 2**32
        told.add(request.seed)
    assert len(told) == 4


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-2, "seed: input should be greater than or equal to -1, got -2"),
        (
            2**64,
            "seed: input should be less than or equal to 18446744073709551615, got "
            "18446744073709551616",
        ),
        (1.5, "seed: input should be a valid integer, got 1.5"),
        ("7", "seed: input should be a valid integer, got '7'"),
    ],
)
def test_other_seeds_are_refused(seed: Any, message: str) -> None:
    assert error_of({"seed": seed})["message"] == message


# The report.


def test_steps_are_timed_for_those_who_want_the_report() -> None:
    timed, _ = asked(PROMPT | {"report": True})
    plain, _ = asked(PROMPT)
    assert timed.is_timed
    assert not plain.is_timed


# Names of other servers.


@pytest.mark.parametrize(
    ("alias", "value", "field"),
    [
        ("num_inference_steps", 7, "num_inference_steps"),
        ("guidance_scale", 2.5, "guidance_scale"),
        ("true_cfg_scale", 4.0, "true_cfg_scale"),
        ("num_images_per_prompt", 3, "num_images_per_prompt"),
    ],
)
def test_names_of_diffusers_are_names_of_ours(
    alias: str, value: Any, field: str
) -> None:
    assert alias in ALIASES
    name = ALIASES[alias]
    for body in (
        {alias: value},
        {name: value},
        {name: value, alias: value},
        {name: None, alias: value},
        {name: value, alias: None},
    ):
        request, _ = asked(PROMPT | body)
        assert getattr(request, field) == value, body
    error = error_of({name: value, alias: value + 1})
    assert error["message"] == (
        f"{alias}: is the same as {name}, but they are given as {value + 1} and "
        f"{value}; leave one out"
    )
    assert error["param"] == alias


def test_every_alias_is_tried() -> None:
    assert len(ALIASES) == 4


@pytest.mark.parametrize("name", ["true_cfg", "steps"])
def test_true_is_not_one(name: str) -> None:
    alias = next(alias for alias, field in ALIASES.items() if field == name)
    error = error_of({name: 1, alias: True})
    assert "leave one out" in error["message"]


def test_an_alias_out_of_range_is_named_as_it_was_sent() -> None:
    error = error_of({"num_inference_steps": 0})
    assert error["param"] == "num_inference_steps"
    assert error["message"].startswith("num_inference_steps: input should be greater")
    assert error_of({"guidance_scale": "x"})["param"] == "guidance_scale"


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"width": 64, "height": 32}, (64, 32)),
        ({"size": "64x32"}, (64, 32)),
        ({"size": "64x32", "width": 64, "height": 32}, (64, 32)),
        ({"size": "auto", "width": 64, "height": 32}, (64, 32)),
        ({"size": "auto"}, (None, None)),
        ({"height": 32}, (None, 32)),
        ({"size": "64x32", "height": 32}, (64, 32)),
    ],
)
def test_width_and_height_are_as_good_as_size(
    body: dict[str, Any], size: tuple[int | None, int | None]
) -> None:
    request, _ = asked(PROMPT | body)
    assert (request.width, request.height) == size


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (
            {"size": "64x32", "width": 32},
            422,
            "width",
            "width: is the same as size, but they are given as 32 and '64x32'; leave "
            "one out",
        ),
        (
            {"size": "64x32", "width": 64, "height": 64},
            422,
            "height",
            "height: is the same as size, but they are given as 64 and '64x32'; leave "
            "one out",
        ),
        (
            {"width": 4096},
            400,
            "width",
            "width: this server allows at most 2048 pixels a side, got 4096",
        ),
        (
            {"height": 4096, "width": 64},
            400,
            "height",
            "height: this server allows at most 2048 pixels a side, got 4096",
        ),
        (
            {"size": "64x4096"},
            400,
            "size",
            "size: this server allows at most 2048 pixels a side, got 4096",
        ),
    ],
)
def test_sizes_that_differ_or_are_too_large_are_named(
    body: dict[str, Any], status: int, param: str, message: str
) -> None:
    error = error_of(body, status)
    assert (error["param"], error["message"]) == (param, message)


# Fields that there are none of.


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("seeds", "seed"),
        ("step", "steps"),
        ("negativ_prompt", "negative_prompt"),
        ("negativePrompt", "negative_prompt"),
        ("guidance_scal", "guidance_scale"),
        ("num_steps", "steps"),
        ("inference_steps", "num_inference_steps"),
        ("heigth", "height"),
        ("cache_option", "cache_options"),
        ("responseFormat", "response_format"),
        ("Prompt", "prompt"),
        ("lora", "loras"),
    ],
)
def test_an_unknown_field_names_the_nearest(name: str, near: str) -> None:
    error = error_of({name: 1})
    assert error["message"] == (
        f"{name}: no such field; did you mean {near}? GET /docs lists them"
    )
    assert (error["param"], error["code"]) == (name, "extra_forbidden")


@pytest.mark.parametrize("name", ["sampler", "x" * 200, "größe"])
def test_a_field_that_is_near_to_none_is_only_named(name: str) -> None:
    assert (
        error_of({name: 1})["message"] == f"{name}: no such field; GET /docs lists them"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"\ud800": 1}, "body: input should be a valid string"),
        ({"quality": "\ud800"}, "quality: input should be a valid string"),
        ({"cache_options": ["\ud800"]}, "cache_options: input should be a valid dict"),
        ({"prompt": "\ud800"}, "prompt: input should be a valid string"),
    ],
)
def test_halves_of_characters_are_refused_in_words(
    body: dict[str, Any], message: str
) -> None:
    content = json.dumps(PROMPT | body).encode()  # httpx cannot write them
    headers = {"Content-Type": "application/json"}
    response = post(None, content=content, headers=headers)
    assert response.status_code == 422
    assert response.json()["error"]["message"].startswith(message)
