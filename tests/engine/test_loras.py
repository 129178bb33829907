"""Requests with LoRAs in an engine: batched with their like, in limited memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from engines import Recorder, request
from folders import TEST_GRAPHS
from pictures import psnr
from serving import Served, served

from max_diffusion import RequestError, TextToImagePipeline, load_pipeline, open_model
from max_diffusion.engine import Engine, EngineConfig
from max_diffusion.execution.compiler import AdaptedGraphs
from max_diffusion.pipelines.graphs import PipelineGraphs

NAMES = ("peft", "kohya", "comfy", "xlabs")
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def files(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LoRA of each name, on the random folder."""
    transformer = lora_files.matrices(flux_folder, "transformer")
    clip = lora_files.matrices(flux_folder, "text_encoder")
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: lora_files.write(
            folder / f"{name}.safetensors",
            lora_files.lora(
                name, transformer, None if name == "xlabs" else clip, seed=index
            ),
        )
        for index, name in enumerate(NAMES)
    }


def loaded(folder: Path, files: Any, limit: int | None) -> TextToImagePipeline:
    return load_pipeline(
        folder,
        device="cpu",
        caches=("none", "taylorseer"),
        precompiled=[TEST_GRAPHS / "float32"],
        adapters=files,
        adapter_memory_limit=limit,
    )


@pytest.fixture(scope="module")
def chooser(flux_folder: Path, files: Any) -> TextToImagePipeline:
    return loaded(flux_folder, files, 2**30)


def test_sixteen_with_four_loras_are_each_as_alone(
    chooser: TextToImagePipeline,
) -> None:
    many = SIZE | {"num_inference_steps": 40}  # so that all run at a time
    requests = [
        request(seed=index, loras=((NAMES[index % 4], 0.5 + index % 2),), **many)
        for index in range(15)
    ]
    requests.append(request(seed=15, **many))
    alone = [chooser.draw(each) for each in requests]
    recorder = Recorder()
    with Engine(chooser, EngineConfig(max_batch=16), observer=recorder) as engine:
        handles = [engine.submit(each) for each in requests]
        results = [handle.result(120) for handle in handles]
    for one, other, each in zip(results, alone, requests, strict=True):
        assert psnr(one.images, other.images) >= 60
        assert one.report.loras == dict(each.loras)
    full = [
        [size for graph, size in turn.batches if graph == "transformer.full"]
        for turn in recorder.turns
    ]
    # Four choices, and one without any.
    assert sorted(max(full, key=sum)) == [1, 3, 4, 4, 4]
    # What no LoRA changes runs for all of them together.
    assert max(size for turn in recorder.turns for _, size in turn.batches) == 16


def test_choices_that_do_not_fit_together_wait_for_each_other(
    flux_folder: Path, files: Any
) -> None:
    needed = loaded(flux_folder, files, 2**30).adapters.num_bytes((("peft", 1.0),))
    pipeline = loaded(flux_folder, files, needed + needed // 2)
    alone = {
        name: pipeline.draw(request(seed=1, loras=((name, 1.0),), **SIZE))
        for name in ("peft", "kohya")
    }
    order = [
        ("peft", 0.5),
        ("kohya", 1.0),
        ("peft", 1.0),
        ("peft", 1.0),
        ("kohya", 1.0),
    ]
    recorder = Recorder()
    with Engine(pipeline, observer=recorder) as engine:
        handles = [
            engine.submit(request(seed=1, loras=(choice,), **SIZE)) for choice in order
        ]
        results = [handle.result(120) for handle in handles]
        assert pipeline.adapters.held_bytes <= pipeline.adapters.limit
    for (name, weight), result in zip(order, results, strict=True):
        is_alike = psnr(result.images, alone[name].images) >= 60
        assert is_alike == (weight == 1.0)
    assert max(turn.requests for turn in recorder.turns) == 2  # the two of one choice


def test_what_is_not_there_is_refused_when_it_is_submitted(
    chooser: TextToImagePipeline,
) -> None:
    with (
        Engine(chooser) as engine,
        pytest.raises(
            RequestError, match="loras: 'z' is not known here, there are peft, kohya"
        ),
    ):
        engine.submit(request(loras=(("z", 1.0),)))


@pytest.fixture(scope="module")
def server(chooser: TextToImagePipeline) -> Iterator[Served]:
    with served(chooser) as running:
        yield running


BODY: dict[str, Any] = {
    "prompt": "a red circle",
    "seed": 3,
    "steps": 4,
    "size": "32x32",
    "report": True,
}


def test_requests_over_http_name_loras(
    server: Served, chooser: TextToImagePipeline
) -> None:
    [card] = server.get("/v1/models").json()["data"]
    assert list(card["loras"]) == list(NAMES)
    assert card["loras"]["xlabs"] == chooser.adapters.num_bytes((("xlabs", 1.0),))
    plain = server.post(**BODY).json()
    assert plain["max_diffusion"]["report"]["loras"] == {}
    for given, loras in (
        (["peft"], {"peft": 1.0}),
        ([{"name": "kohya", "weight": 0.5}, "peft"], {"kohya": 0.5, "peft": 1.0}),
    ):
        answer = server.post(**BODY, loras=given)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["max_diffusion"]["report"]["loras"] == loras
        assert body["data"] != plain["data"]


@pytest.mark.parametrize(
    ("loras", "status", "message"),
    [
        (["z"], 400, "loras: 'z' is not served here; there are: peft, kohya, comfy"),
        (["peft", "peft"], 400, "loras: 'peft' is given twice"),
        (
            [{"name": "peft", "weight": 1e9}],
            422,
            "loras.0.weight: input should be less",
        ),
        (
            [{"name": "peft", "weight": "much"}],
            422,
            "loras.0.weight: input should be a valid num",
        ),
        ([{"name": "peft", "file": "/etc/passwd"}], 422, "loras.0.file: no such field"),
        ("peft", 422, "loras"),
        ([3], 422, "loras.0: input should be a valid dictionary"),
        (["peft"] * 17, 422, "loras"),
    ],
)
def test_what_is_asked_wrongly_over_http(
    server: Served, loras: Any, status: int, message: str
) -> None:
    answer = server.post(**BODY, loras=loras)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["param"].startswith("loras")


def test_a_set_is_shared_by_those_of_one_choice(chooser: TextToImagePipeline) -> None:
    one, other = (
        chooser.adapters.chosen(choice)
        for choice in (
            (("peft", 1.0), ("kohya", 0.5)),
            (("kohya", 0.5), ("xlabs", 0.0), ("peft", 1.0)),
        )
    )
    assert one == other
    assert chooser.adapters.graphs_of(one) is chooser.adapters.graphs_of(other)
    assert np.array_equal(
        chooser.generate("a", seed=1, loras=one, **SIZE).images,
        chooser.generate("a", seed=1, loras=other, **SIZE).images,
    )


def test_threads_keep_the_limit_together(
    flux_folder: Path, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = open_model(flux_folder, "cpu", adapters=files).adapters.num_bytes(
        (("peft", 1.0),)
    )
    pipeline = loaded(flux_folder, files, needed + needed // 2)
    adapted = PipelineGraphs.adapted

    def slow(self: PipelineGraphs, weights: Mapping[str, Any]) -> AdaptedGraphs:
        time.sleep(0.02)
        return adapted(self, weights)

    monkeypatch.setattr(PipelineGraphs, "adapted", slow)
    choices = [(("peft", weight),) for weight in (0.25, 0.5, 0.75, 1.0)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pipeline.adapters.graphs_of, choices * 2))
    assert pipeline.adapters.held_bytes == needed
