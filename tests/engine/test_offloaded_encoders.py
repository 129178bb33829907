"""Text encoders that are in memory only while they encode."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from engines import hold, request

from max_diffusion import (
    MaxDiffusionError,
    RequestError,
    TextToImagePipeline,
    demo_model_path,
    load_pipeline,
    open_model,
)
from max_diffusion.checkpoint import ComponentWeights
from max_diffusion.engine import Engine

ENCODERS = {"text_encoder", "text_encoder_2"}


@pytest.fixture(scope="module")
def offloading() -> TextToImagePipeline:
    return load_pipeline("demo", "cpu", "float32", offload_text_encoders=True)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the components whose weights are read, in that order."""
    found: list[str] = []
    load = ComponentWeights.load

    def counted(self: ComponentWeights, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found.append(self.name)
        return load(self, *args, **kwargs)

    monkeypatch.setattr(ComponentWeights, "load", counted)
    yield found


def arrays_of(pipeline: TextToImagePipeline, component: str) -> dict[str, Any]:
    compiled = pipeline.graphs._compiled
    assert compiled is not None
    return {
        name: array
        for name, array in compiled._weights.items()
        if name.split(".")[0] == component
    }


def test_pictures_are_the_same_to_the_bit(
    demo: TextToImagePipeline, offloading: TextToImagePipeline
) -> None:
    for options in (
        {"prompt": ["a red circle", "two blue stars"], "seed": 3},
        {"prompt": "x", "negative_prompt": "y", "true_cfg_scale": 2.0, "seed": 4},
    ):
        kept = demo.generate(**options, num_inference_steps=4)  # type: ignore[arg-type]
        found = offloading.generate(**options, num_inference_steps=4)  # type: ignore[arg-type]
        assert np.array_equal(found.images, kept.images)


def test_they_are_read_for_a_request_and_leave_after(
    offloading: TextToImagePipeline, loads: list[str]
) -> None:
    assert not any(arrays_of(offloading, name) for name in ENCODERS)
    assert arrays_of(offloading, "transformer")
    assert not ENCODERS & {name.split(".")[0] for name in offloading.graphs.models}
    with offloading.graphs.text_encoders():
        held = [
            weakref.ref(array)
            for array in arrays_of(offloading, "text_encoder").values()
        ]
        assert held
        assert set(offloading.graphs.models) >= ENCODERS
        offloading.generate("x", num_inference_steps=1)
    assert sorted(loads) == sorted(ENCODERS)  # once, though two used them
    gc.collect()
    assert not any(ref() is not None for ref in held)
    offloading.generate("x", num_inference_steps=1)
    assert len(loads) == 4


def test_an_engine_reads_them_once_for_all_that_wait(
    offloading: TextToImagePipeline, loads: list[str]
) -> None:
    with Engine(offloading) as engine:
        gate, first = hold(engine)
        assert sorted(loads) == sorted(ENCODERS)
        handles = [engine.submit(request(seed=seed)) for seed in range(6)]
        gate.is_open.set()
        images = [handle.result(60).images for handle in handles]
        first.result(60)
    assert len(loads) == 4
    alone = offloading.draw(request(seed=5)).images
    assert np.abs(images[5].astype(int) - alone).max() <= 1
    assert not any(arrays_of(offloading, name) for name in ENCODERS)


def test_threads_share_them(offloading: TextToImagePipeline) -> None:
    def draw(seed: int) -> np.ndarray:
        return offloading.generate("a star", seed=seed, num_inference_steps=2).images

    wanted = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(draw, range(4)))
    assert all(map(np.array_equal, found, wanted))
    assert not any(arrays_of(offloading, name) for name in ENCODERS)


def test_files_that_are_gone_end_a_request_alone(
    offloading: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ComponentWeights.load

    def lost(self: ComponentWeights, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise MaxDiffusionError("text_encoder: the file is gone")

    with Engine(offloading) as engine:
        monkeypatch.setattr(ComponentWeights, "load", lost)
        with pytest.raises(MaxDiffusionError, match="the file is gone"):
            engine.submit(request(seed=1)).result(60)
        monkeypatch.setattr(ComponentWeights, "load", load)
        assert engine.submit(request(seed=1)).result(60).images.size


def test_loras_that_requests_choose_may_change_the_transformer_only(
    tmp_path: Path,
) -> None:
    transformer, encoder = (
        lora_files.matrices(demo_model_path(), name)
        for name in ("transformer", "text_encoder")
    )
    tensors = lora_files.lora("peft", transformer, encoder)
    path = lora_files.write(tmp_path / "words.safetensors", tensors)
    style = lora_files.lora("peft", transformer)
    other = lora_files.write(tmp_path / "style.safetensors", style)
    open_model("demo", "cpu", adapters={"style": other}, offload_text_encoders=True)
    message = r"offload_text_encoders: the LoRA words changes text_encoder,"
    with pytest.raises(RequestError, match=message):
        open_model("demo", "cpu", adapters={"words": path}, offload_text_encoders=True)


def test_they_come_for_a_request_that_chooses_loras(tmp_path: Path) -> None:
    tensors = lora_files.lora(
        "peft", lora_files.matrices(demo_model_path(), "transformer")
    )
    path = lora_files.write(tmp_path / "style.safetensors", tensors)
    pipelines = [
        load_pipeline(
            "demo", "cpu", adapters={"style": path}, offload_text_encoders=is_
        )
        for is_ in (True, False)
    ]
    pipelines[0].adapters.graphs_of((("style", 0.5),))  # while no encoder is there
    # A set is made, is there, and is made anew with the encoders.
    for weight in (1.0, 1.0, 0.5):
        found, kept = (
            each.generate(
                "x", seed=1, num_inference_steps=2, loras={"style": weight}
            ).images
            for each in pipelines
        )
        assert np.array_equal(found, kept)
    assert not any(arrays_of(pipelines[0], name) for name in ENCODERS)
