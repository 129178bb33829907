"""Values of a request and of a cache are checked where they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from max_diffusion import (
    DeviceError,
    FirstBlockConfig,
    GenerationRequest,
    PromptTexts,
    RequestError,
    TaylorSeerConfig,
)
from max_diffusion.execution.compiler import memory_errors_said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": "abc"}, "must be a tuple of at least one prompt, got 'abc'"),
        ({"prompts": ()}, "must be a tuple of at least one prompt, got ()"),
        ({"prompts": (3,)}, "a prompt must be text, got int"),
        ({"prompts": ("\ud800",)}, "a prompt: expected UTF-8 text"),
        ({"negative_prompt": 3}, "negative_prompt must be text, got int"),
        ({"negative_prompt": ("a", "b")}, "as many as there are prompts, 1; got 2"),
        ({"negative_prompt_2": (3,)}, "each negative_prompt_2 must be text, got int"),
        ({"prompt_2": ["a"]}, "prompt_2 must be text, got list"),
        ({"prompt_2": ()}, "prompt_2 must be one text, or as many"),
        ({"options": ("a", 1)}, "options must be values by name, got ('a', 1)"),
        ({"seeds": (1, 2)}, "2 seeds for pictures: 1; give one for each, or a single"),
        ({"seeds": [1]}, "seeds must be a tuple, got [1]"),
        ({"seeds": (1.5,)}, "seed must be a whole number, got 1.5"),
        ({"seeds": (1, 2**64), "num_images_per_prompt": 2}, "seed must be in"),
        ({"height": 10**6}, "height must be at most 16384, got 1000000"),
        ({"height": 8.0}, "height must be a whole number, got 8.0"),
        ({"num_images_per_prompt": None}, "must be a whole number, got None"),
        ({"num_images_per_prompt": 10**9}, "at most 10000 are drawn"),
        ({"seed": 2**64}, "seed must be in"),
        ({"guidance_scale": "3"}, "must be a number of 0 or more, got '3'"),
        ({"guidance_scale": 1e40}, "must be a number of 0 or more, got 1e+40"),
        ({"true_cfg_scale": True}, "must be a number of 0 or more, got True"),
        ({"is_timed": 1}, "is_timed must be True or False, got 1"),
    ],
    ids=str,
)
def test_bad_requests_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        GenerationRequest(**({"prompts": ("a",)} | values))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_are_of_each_prompt() -> None:
    request = GenerationRequest(
        prompts=("a", "b"),
        prompt_2="c",
        negative_prompt=("d", ""),
        num_images_per_prompt=2,
        seeds=(1, 2, 3, 4),
    )
    assert request.num_images == 4
    assert request.texts == PromptTexts(("a", "b"), ("c", "c"))
    assert request.negative_texts == PromptTexts(("d", ""), ("d", ""))
    plain = GenerationRequest(prompts=("a", "b"), prompt_2="", negative_prompt_2="x")
    assert plain.texts == PromptTexts(("a", "b"), ("a", "b"))  # as in diffusers
    assert plain.negative_texts is None
    empty = GenerationRequest(prompts=("a",), prompt_2=("",), negative_prompt="")
    assert empty.texts == PromptTexts(("a",), ("",))
    assert empty.negative_texts == PromptTexts.same("", 1)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TaylorSeerConfig, {"cache_interval": 1.5}),
        (TaylorSeerConfig, {"warmup_steps": None}),
        (TaylorSeerConfig, {"max_order": True}),
        (TaylorSeerConfig, {"cache_interval": np.uint8(5)}),
        (FirstBlockConfig, {"threshold": "x"}),
        (FirstBlockConfig, {"warmup_steps": 1.5}),
        (FirstBlockConfig, {"max_consecutive_cached": -1}),
    ],
)
def test_bad_cache_settings_are_refused(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        kind(**values)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("An error occurred\nAt device_context: Memory allocation failed\n"),
        RuntimeError("CUDA call failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory)"),
        MemoryError("Unable to allocate 4.00 TiB"),
    ],
    ids=["max", "cuda", "numpy"],
)
def test_want_of_memory_is_one_line(error: Exception) -> None:
    said = pytest.raises(DeviceError, match="device: out of memory; ask")
    with said as caught, memory_errors_said():
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ValueError, match="shape"), memory_errors_said():
        raise ValueError("wrong shape")
    quoted = RequestError("a prompt: expected UTF-8 text, got 'out of memory'")
    with pytest.raises(RequestError), memory_errors_said():
        raise quoted
