"""Two replicas of the demo model in a real Ray, over real HTTP, killed for real."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import pickle
import re
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import openai
import pytest
from pictures import psnr
from PIL import Image
from processes import run_python
from pydantic import ValidationError
from serving import free_port, wait_until

from max_diffusion import (
    CACHES,
    MaxDiffusionError,
    NoCacheConfig,
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
    TextToImagePipeline,
)
from max_diffusion.core.request import GenerationRequest
from max_diffusion.engine import (
    Engine,
    EngineConfig,
    EngineStoppedError,
    Failed,
    Finished,
    SubmitOptions,
)
from max_diffusion.engine.executor import Executor
from max_diffusion.errors import CacheNotLoadedError
from max_diffusion.serving.http import LocalBackend

# Read when ray is imported: nothing is sent home, all ports are on the loopback
# interface (the name is Ray's; on Linux it is not only about clusters), the key of this
# Ray is not written to the home folder, and on a busy machine its processes have time
# to start.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    ray = import_module("ray")
    serve = import_module("ray.serve")
    ray_serve = import_module("max_diffusion.serving.ray_serve")

PROMPT = "a red circle above a blue square"
KEY = "sk-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
LONG = 120  # steps: a second, on any machine
ENDLESS = 5000


@dataclass(frozen=True)
class Service:
    """The service, from outside and from behind."""

    url: str

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(
            f"{self.url}/v1/images/generations",
            json={"prompt": PROMPT} | body,
            headers=HEADERS,
            timeout=600,  # where others keep the machine busy
        )

    @contextmanager
    def stream(self, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Events as they come."""
        with httpx.stream(
            "POST",
            f"{self.url}/v1/images/generations",
            json={"prompt": PROMPT, "stream": True} | body,
            headers=HEADERS,
            timeout=600,  # where others keep the machine busy
        ) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            yield (json.loads(line[6:]) for line in lines if line.startswith("data: "))

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def states(self) -> list[Any]:
        """Of the replicas that answer."""
        handle = serve.get_deployment_handle("Replica", "default")
        found = handle.broadcast("state").results(timeout_s=30, return_exceptions=True)
        return [item for item in found if isinstance(item, ray_serve.ReplicaState)]

    def running(self) -> dict[int, int]:
        """Requests by the process that draws them."""
        return {state.pid: state.stats.running for state in self.states()}

    def is_whole(self) -> bool:
        return self.get("/health").json()["detail"] == "2 of 2 replicas are ready"

    def grow(self) -> None:
        """Asks for more than one replica is to have, until there are two."""
        with ThreadPoolExecutor(4) as pool:
            while not self.is_whole():
                list(pool.map(lambda _: self.post(steps=LONG), range(4)))

    def metric(self, name: str) -> dict[str, float]:
        """By replica; of the service itself by an empty name."""
        lines = re.findall(
            rf"^{name}(?:{{(.*)}})? (\S+)$", self.get("/metrics").text, re.MULTILINE
        )
        return {
            "".join(re.findall(r'replica="(\w+)"', labels)): float(value)
            for labels, value in lines
        }


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With one replica, and as many as two if they are needed."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    options = ray_serve.Options(
        device="cpu",
        dtype="float32",
        max_replicas=2,
        target_ongoing_requests=1,
        look_back_period=11,
        upscale_delay=0,
        max_ongoing_requests=4,
        # Ray counts those, too, that it is finding a replica for: all that a test sends
        # at once.
        max_queued_requests=6,
        health_check_period=1,
        api_key_file=str(keys),
        max_steps=ENDLESS,
    )
    port = free_port()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
    )
    try:
        ray_serve.start(options, port=port)
        yield Service(f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def service(started: Service) -> Service:
    """With two replicas, whatever a test before did to them."""
    if len(started.states()) == 1:
        started.grow()
    wait_until(started.is_whole)
    return started


def picture(data: str) -> np.ndarray:
    content = base64.b64decode(data)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def only_picture(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return picture(response.json()["data"][0]["b64_json"])


def test_a_replica_is_added_when_requests_wait(started: Service) -> None:
    assert started.get("/health").json()["detail"] == "1 of 1 replicas are ready"
    started.grow()
    assert len(started.states()) == 2


def test_picture_is_that_of_the_pipeline(
    service: Service, demo: TextToImagePipeline
) -> None:
    # Large enough to come through Ray's shared memory.
    response = service.post(seed=7, steps=12, size="256x128", n=2, cache="taylorseer")
    alone = demo.generate(
        PROMPT,
        seed=7,
        width=256,
        height=128,
        num_inference_steps=12,
        num_images_per_prompt=2,
        cache=TaylorSeerConfig(),
    )
    body = response.json()
    for item, wanted in zip(body["data"], alone.images, strict=True):
        assert psnr(picture(item["b64_json"]), wanted) >= 60
    assert body["max_diffusion"]["full_passes"] == alone.report.full_passes


def test_openai_client_understands_errors(service: Service) -> None:
    settings: Any = {"base_url": f"{service.url}/v1", "api_key": KEY}
    with openai.OpenAI(**settings, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="got 'xx'") as caught:
            client.images.generate(prompt=PROMPT, extra_body={"cache": "xx"})
        assert caught.value.type == "invalid_request_error"
        # Found by the model, in the replica: the same error.
        with pytest.raises(openai.BadRequestError, match="multiple of 16") as caught:
            client.images.generate(prompt=PROMPT, size="100x100")
        assert caught.value.code == "invalid_value"
        with pytest.raises(openai.UnprocessableEntityError, match="no such field"):
            client.images.generate(prompt=PROMPT, extra_body={"stepz": 3})
        assert [model.id for model in client.models.list().data] == ["demo"]
        with pytest.raises(openai.AuthenticationError, match="not known"):
            client.with_options(api_key="sk-other").models.list()


def test_stream_has_previews_and_progress(
    service: Service, demo: TextToImagePipeline
) -> None:
    with service.stream(seed=3, steps=12, partial_images=2, progress=True) as stream:
        found = list(stream)
    kinds = [event["type"].removeprefix("image_generation.") for event in found]
    assert kinds.count("progress") == 12
    assert kinds.count("partial_image") == 2
    assert kinds[-1] == "completed"
    alone = demo.generate(PROMPT, seed=3, num_inference_steps=12).images[0]
    assert psnr(picture(found[-1]["b64_json"]), alone) >= 60


def test_both_replicas_draw(service: Service) -> None:
    with ExitStack() as streams:
        for _ in range(6):  # each is entered when a replica has it
            streams.enter_context(service.stream(steps=ENDLESS))
        running = service.running()
    assert sum(running.values()) == 6
    assert min(running.values()) >= 2
    wait_until(lambda: not any(service.running().values()), 5)


def test_health_and_metrics_are_of_all_replicas(service: Service) -> None:
    health = service.get("/health").json()
    assert health["status"] == "ready"
    states = service.states()
    assert len({state.pid for state in states}) == 2
    assert health["memory_limit"] == sum(state.stats.memory_limit for state in states)
    assert service.metric("max_diffusion_replicas") == {"": 2}
    running = service.metric("max_diffusion_running_requests")
    assert running.keys() == {state.id for state in states}
    text = service.get("/metrics").text
    assert text.count("# TYPE max_diffusion_running_requests gauge") == 1


def test_client_that_leaves_cancels_on_the_replica(service: Service) -> None:
    with service.stream(steps=ENDLESS, progress=True) as stream:
        next(stream)
        assert sum(service.running().values()) == 1
    wait_until(lambda: not any(service.running().values()), 5)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{service.url}/v1/images/generations",
            json={"prompt": PROMPT, "steps": ENDLESS},
            headers=HEADERS,
            timeout=1,
        )
    wait_until(lambda: not any(service.running().values()), 5)


def test_full_replicas_let_wait_and_then_refuse(service: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        with ExitStack() as streams:
            for _ in range(8):
                streams.enter_context(service.stream(steps=ENDLESS))
            wait_until(lambda: service.get("/health").json()["running"] == 8)
            late = service.post(timeout=1)
            posts = [pool.submit(service.post, steps=1) for _ in range(8)]
            wait_until(lambda: sum(post.done() for post in posts) == 2)
        answers = [post.result() for post in posts]
    assert late.status_code == 504
    assert "no replica had room in 1 s" in late.json()["error"]["message"]
    answers.sort(key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200] * 6 + [429] * 2
    for refused in answers[6:]:
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"


def test_requests_of_a_killed_replica_are_drawn_by_another(
    service: Service, demo: TextToImagePipeline
) -> None:
    # Longer than it takes to look, also where both replicas share a starved machine.
    steps, seeds = 4 * LONG, (1, 2, 3)

    def streamed(seed: int) -> list[dict[str, Any]]:
        with service.stream(seed=seed, steps=steps, progress=True) as stream:
            return list(stream)

    # What replicas tell is a moment old: of the requests of the test before, here.
    wait_until(lambda: service.is_whole() and not any(service.running().values()))
    before = service.metric("max_diffusion_retried_requests_total")[""]
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(streamed, seed) for seed in seeds]
        posts = [pool.submit(service.post, seed=seed, steps=steps) for seed in seeds]
        # Not for all six: on a starved machine the first is done before the last comes.
        killed = kill_the_one_that_draws(service)
    after = service.metric("max_diffusion_retried_requests_total")[""]
    # Four have room in one; since we looked, more may have come, or some be done.
    assert 1 <= after - before <= 4
    for seed, stream, post in zip(seeds, streams, posts, strict=True):
        alone = demo.generate(PROMPT, seed=seed, num_inference_steps=steps).images[0]
        answer = post.result().json()["data"][0]["b64_json"]
        assert psnr(picture(answer), alone) >= 60
        first, *progress, last = stream.result()
        assert first["type"] == "image_generation.started"
        # None is told twice, though some were drawn twice.
        assert [event["step"] for event in progress] == [*range(1, steps + 1)]
        assert psnr(picture(last["b64_json"]), alone) >= 60
    wait_until(service.is_whole)
    assert killed not in service.running()


def test_a_request_that_has_shown_a_picture_is_not_drawn_again(
    service: Service,
) -> None:
    wait_until(service.is_whole)
    before = service.metric("max_diffusion_lost_requests_total")[""]
    with service.stream(steps=ENDLESS, partial_images=100) as stream:
        assert next(stream)["type"] == "image_generation.partial_image"
        kill_the_one_that_draws(service)
        *_, last = stream
    assert last["type"] == "error"
    assert last["error"]["code"] == "replica_lost"
    assert "after a preview was sent; ask again" in last["error"]["message"]
    after = service.metric("max_diffusion_lost_requests_total")[""]
    assert after - before == 1


def test_a_request_that_loses_two_replicas_fails(service: Service) -> None:
    wait_until(service.is_whole)  # after the test before
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.post, steps=ENDLESS)
        kill_the_one_that_draws(service)
        kill_the_one_that_draws(service)
        lost = answer.result()
    assert lost.status_code == 503
    assert lost.json()["error"]["code"] == "replica_lost"
    assert "and so was a second one; ask again" in lost.json()["error"]["message"]
    health = service.get("/health")
    assert health.status_code == 503
    assert health.json()["detail"].startswith("0 of ")
    assert service.metric("max_diffusion_replicas") == {"": 0}


def kill_the_one_that_draws(service: Service) -> int:
    """Kills the process that draws most, and returns which one it was."""
    running: dict[int, int] = {}

    def is_one_drawing() -> bool:
        running.clear()
        running.update(service.running())
        return any(running.values())

    wait_until(is_one_drawing)
    pid = max(running, key=lambda pid: running[pid])  # of that very look
    os.kill(pid, signal.SIGKILL)
    return pid


# Without Ray.


class Loaded:
    """In the place of what loads a model: it is there."""

    def __init__(self, pipeline: TextToImagePipeline) -> None:
        self.pipeline = pipeline

    def load(self, backend: LocalBackend, config: EngineConfig) -> Engine:
        return Engine(self.pipeline, config, observer=backend.observer)


def test_replica_whose_engine_stops_ends(
    demo: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(sys, "setswitchinterval", id)
    monkeypatch.setattr(serve, "get_replica_context", MagicMock())
    monkeypatch.setattr(ray_serve.Replica, "_report", lambda self: None)

    async def draw(replica: Any) -> list[Any]:
        request = GenerationRequest(prompts=(PROMPT,), num_inference_steps=2)
        items = replica.draw(request, SubmitOptions())
        return [item async for item in items]

    replica = ray_serve.Replica(Loaded(demo), EngineConfig())
    replica.check_health()
    first, *_, last = asyncio.run(draw(replica))
    assert isinstance(first, ray_serve.replica.Accepted)
    assert isinstance(last, Finished)
    assert ends == []

    def fail(*args: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Executor, "take_turn", fail)
    *_, last = asyncio.run(draw(replica))
    assert isinstance(last, Failed)
    assert ends == [1]
    with pytest.raises(EngineStoppedError, match="its engine has stopped"):
        replica.check_health()
    [last] = asyncio.run(draw(replica))
    assert isinstance(last.error, EngineStoppedError)
    assert ends == [1, 1]


def test_replica_that_tells_nothing_is_taken_for_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    backend = ray_serve.RayBackend(MagicMock())
    text = '# TYPE steps counter\nsteps_total{cache="none"} 3.0\n'
    for name in ("one", "two"):
        backend.report(MagicMock(id=name, metrics=text))
    shown = asyncio.run(backend.metrics()).decode()
    assert "max_diffusion_replicas 2.0" in shown
    assert shown.count("# TYPE steps_total counter") == 1
    assert 'steps_total{cache="none",replica="two"} 3.0' in shown
    now += 8
    backend.report(MagicMock(id="two", metrics=text))
    now += 8
    shown = asyncio.run(backend.metrics()).decode()
    assert "max_diffusion_replicas 1.0" in shown
    assert 'replica="one"' not in shown


def test_start_says_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = MagicMock(
        status="DEPLOY_FAILED", message="Traceback:\n  file\nModelLoadError: no folder"
    )
    deployments = {"Replica": failed, "Ingress": MagicMock(status="HEALTHY")}
    status = MagicMock(applications={"default": MagicMock(deployments=deployments)})
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(serve, "start", MagicMock())
    monkeypatch.setattr(serve, "run", MagicMock(side_effect=RuntimeError("failed")))
    monkeypatch.setattr(serve, "status", lambda: status)
    with pytest.raises(MaxDiffusionError) as caught:
        ray_serve.start(ray_serve.Options(device="cpu"))
    assert str(caught.value) == (
        "ray_serve: it did not start: ModelLoadError: no folder"
    )


def test_options_are_checked_before_anything_starts(tmp_path: Path) -> None:
    build = ray_serve.app
    with pytest.raises(RequestError, match="ray_serve: caches: expected all"):
        build(ray_serve.Options(caches="none,xx"))
    with pytest.raises(RequestError, match="max_size must be at least 1, got 0"):
        build(ray_serve.Options(max_size=0))
    with pytest.raises(RequestError, match="lora_memory has no effect without loras"):
        build(ray_serve.Options(lora_memory=2**30))
    with pytest.raises(RequestError, match="cannot be read"):
        build(ray_serve.Options(api_key_file=str(tmp_path / "none")))
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ray_serve.Options.model_validate({"modell": "demo"})


def test_options_are_read_from_the_command_line() -> None:
    options = ray_serve.Options.model_validate(
        {
            "caches": "none,taylorseer",
            "cache": "taylorseer",
            "cache_options": '{"cache_interval": 3}',
            "min_replicas": "2",
            "device": "cpu",
            "precompiled": "/graphs,here",
            "require_precompiled": "true",
            "pictures": "true",
        }
    )
    model = options.loader()
    assert model.precompiled == ["/graphs", str(Path("here").resolve())]
    assert model.require_precompiled is True
    assert model.takes_pictures is True
    assert model.caches == (NoCacheConfig(), TaylorSeerConfig())
    assert model.cache == TaylorSeerConfig(cache_interval=3)
    assert options.most_replicas == 2
    assert options.settings().cors_origins == ()


@pytest.mark.parametrize(
    "caches",
    [
        "none,taylorseer:target=modules,step-mask:compute_steps=0,5",
        ["none", "taylorseer:target=modules", "step-mask:compute_steps=0,5"],
    ],
)
def test_caches_take_options_as_on_the_command_line(caches: Any) -> None:
    options = ray_serve.Options.model_validate(
        {"caches": caches, "cors_origins": "https://a.example,https://b.example"}
    )
    assert options.loader().caches == (
        NoCacheConfig(),
        TaylorSeerConfig(target="modules"),
        StepMaskConfig(compute_steps=(0, 5)),
    )
    origins = ("https://a.example", "https://b.example")
    assert options.settings().cors_origins == origins


def test_all_caches_are_those_there_are() -> None:
    caches = ray_serve.Options(caches="all").loader().caches
    assert caches == tuple(kind() for kind in CACHES.values())


def test_errors_cross_between_processes_whole() -> None:
    error = CacheNotLoadedError("cache: pab needs graphs", "pab")
    read = pickle.loads(pickle.dumps(error))
    assert (str(read), read.problem, read.cache) == (
        "cache: pab needs graphs; give it in caches at load",
        "cache: pab needs graphs",
        "pab",
    )


def test_without_ray_one_line_says_what_to_install() -> None:
    done = run_python(
        "import sys; sys.modules['ray'] = None; import max_diffusion.serving.ray_serve"
    )
    assert done.stderr.splitlines()[-1].endswith(
        'install it with: pip install "max-diffusion[ray]"'
    )
