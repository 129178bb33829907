"""Videos as jobs, by OpenAI's own client and without."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import av
import httpx
import numpy as np
import openai
import pytest
import toy_video
from openai.types.video_create_params import VideoCreateParams
from PIL import Image
from processes import run
from serving import Served, listening, served, wait_until
from sketcher import Sketcher, ask, asking, post
from toy_video import ToyVideoPipeline

from max_diffusion import MaxDiffusionError, RequestError
from max_diffusion.engine import Engine, EngineConfig
from max_diffusion.media.metadata import read_settings
from max_diffusion.serving.http import LocalBackend, ServerSettings
from max_diffusion.serving.http.backend import VideoDescription
from max_diffusion.serving.http.bodies import field_names
from max_diffusion.serving.http.video_schemas import Video, VideoRequest

# Of the client: OpenAI's own models are to be shut down.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
VIDEOS = "/v1/videos"
# As of a model whose frames are one more than a multiple of 8.
OF_8 = VideoDescription(num_frames=9, fps=8.0, counts=(9, 17, 25, 33))
LONG: Any = {"steps": 9999}


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    with toy_video.registered():
        yield


@pytest.fixture(scope="module")
def pipeline(
    tmp_path_factory: pytest.TempPathFactory, family: None
) -> ToyVideoPipeline:
    return toy_video.load(toy_video.write_folder(tmp_path_factory.mktemp("video")))


@pytest.fixture(scope="module")
def server(pipeline: ToyVideoPipeline) -> Iterator[Served]:
    with served(pipeline, max_steps=9999, max_size=64) as server:
        yield server


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    settings: Any = {"base_url": f"{server.url}/v1", "api_key": "none"}
    with openai.OpenAI(**settings, max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, **fields: Any) -> openai.types.Video:
    own = {k: fields.pop(k) for k in ("seconds", "size", "model") if k in fields}
    prompt = fields.pop("prompt", "gray 90")
    return client.videos.create(prompt=prompt, **own, extra_body=fields)


def ended(client: openai.OpenAI, video: openai.types.Video) -> openai.types.Video:
    def is_over() -> bool:
        return client.videos.retrieve(video.id).status in ("completed", "failed")

    wait_until(is_over)
    return client.videos.retrieve(video.id)


async def over(client: httpx.AsyncClient, identifier: str) -> dict[str, Any]:
    """The same without a socket."""
    while True:
        video: dict[str, Any] = (await client.get(f"{VIDEOS}/{identifier}")).json()
        if video["status"] in ("completed", "failed"):
            return video
        await asyncio.sleep(0.005)


def decoded(data: bytes) -> tuple[np.ndarray, Fraction | None]:
    with av.open(io.BytesIO(data), "r") as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        return np.stack(frames), container.streams.video[0].average_rate


def refused(body: Any, backend: Sketcher | None = None, **options: Any) -> Any:
    """The error of a body, and its status."""
    backend = backend or Sketcher(video=OF_8)
    response = asyncio.run(ask(backend, "POST", VIDEOS, json=body, **options))
    assert response.status_code >= 400, response.text
    error = response.json()["error"]
    assert "\n" not in error["message"]
    assert error["code"]
    assert backend.drawn == []
    return response.status_code, error


# OpenAI's own client, unchanged.


def test_a_video_is_drawn_and_fetched(
    client: openai.OpenAI, pipeline: ToyVideoPipeline, tmp_path: Path
) -> None:
    video = create(
        client, model="demo", size="8x6", seed=3, num_frames=5, fps=12, steps=7
    )
    assert (video.object, video.model, video.prompt) == ("video", "demo", "gray 90")
    assert (video.size, video.seconds) == ("8x6", "0.416667")
    assert video.status in ("queued", "in_progress")
    assert video.completed_at is None
    done = ended(client, video)
    assert (done.id, done.status, done.progress) == (video.id, "completed", 100)
    assert done.error is None
    assert done.completed_at is not None
    assert done.expires_at == done.completed_at + 3600
    assert done.created_at == video.created_at <= done.completed_at
    assert done.model_extra is not None
    summary = done.model_extra["max_diffusion"]
    assert (summary["seed"], summary["steps"], summary["cache"]) == (3, 7, "none")
    answer = client.videos.download_content(video.id)
    assert answer.response.headers["content-type"] == "video/mp4"
    part = client.videos.download_content(
        video.id, extra_headers={"Range": "bytes=0-1"}
    )
    assert (part.response.status_code, part.content) == (206, answer.content[:2])
    frames, rate = decoded(answer.content)
    own: Any = {"num_frames": 5, "fps": 12.0, "num_inference_steps": 7}
    alone = pipeline.generate("gray 90", seed=3, width=8, height=6, **own)
    assert frames.shape == alone.frames[0].shape == (5, 6, 8, 3)
    assert np.abs(frames.astype(int) - alone.frames[0]).max() <= 3
    assert rate == 12
    path = tmp_path / "x.mp4"
    path.write_bytes(answer.content)
    settings = read_settings(path)
    assert (settings["prompts"], settings["seed"]) == (["gray 90"], 3)
    assert (settings["num_frames"], settings["fps"]) == (5, 12.0)
    first = client.videos.download_content(video.id, variant="thumbnail")
    assert first.response.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(first.content)) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels.astype(int) - alone.frames[0, 0]).max() <= 4
    with pytest.raises(openai.BadRequestError, match="no spritesheets are made here"):
        client.videos.download_content(video.id, variant="spritesheet")


def test_lists_and_objects_of_the_client_are_read(client: openai.OpenAI) -> None:
    mask = {"compute_steps": [0, 3]}
    done = ended(client, create(client, steps=6, cache="step-mask", cache_options=mask))
    assert done.model_extra is not None
    assert done.model_extra["max_diffusion"]["full_passes"] == 2
    with pytest.raises(openai.BadRequestError, match="loras: 'ink' is not served here"):
        create(client, loras=["ink", "style"])


def test_the_client_polls(client: openai.OpenAI) -> None:
    done = client.videos.create_and_poll(
        prompt="gray 9", poll_interval_ms=10, extra_body={"seed": 1, "report": True}
    )
    assert (done.status, done.size, done.seconds) == ("completed", "6x4", "0.375")
    assert done.model_extra is not None
    assert len(done.model_extra["max_diffusion"]["report"]["steps"]) == 20


def test_progress_grows_and_deleting_cancels(
    server: Served, client: openai.OpenAI
) -> None:
    video = create(client, **LONG)
    seen = set()

    def is_on_its_way() -> bool:
        now = client.videos.retrieve(video.id)
        seen.add(now.progress)
        return now.status == "in_progress" and now.progress > 0

    wait_until(is_on_its_way)
    assert max(seen) < 100
    assert server.engine.stats().running == 1
    with pytest.raises(openai.NotFoundError, match="it is in_progress, "):
        client.videos.download_content(video.id)
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted) == (video.id, True)
    assert deleted.object == "video.deleted"
    wait_until(lambda: server.engine.stats().running == 0)
    for ask_again in (client.videos.retrieve, client.videos.delete):
        with pytest.raises(openai.NotFoundError, match=f"{video.id} is not here"):
            ask_again(video.id)


def test_a_job_that_fails_says_why(client: openai.OpenAI) -> None:
    done = ended(client, create(client, timeout=1, **LONG))
    assert done.status == "failed"
    assert done.error is not None
    assert done.error.code == "deadline_exceeded"
    assert done.completed_at is None
    with pytest.raises(openai.NotFoundError, match=re.escape(done.error.message)):
        client.videos.download_content(done.id)
    client.videos.delete(done.id)


def test_a_full_queue_says_when_to_come_again(pipeline: ToyVideoPipeline) -> None:
    config = EngineConfig(max_running=1, max_queued=0)
    with served(pipeline, config, max_steps=9999) as server:
        url = server.url + VIDEOS
        first = httpx.post(url, json={"prompt": "gray 1", **LONG}).json()
        second = httpx.post(url, json={"prompt": "gray 1"})
        assert second.status_code == 429
        assert int(second.headers["retry-after"]) >= 1
        assert [v["id"] for v in server.get(VIDEOS).json()["data"]] == [first["id"]]


def test_a_server_that_ends_cancels_its_jobs(pipeline: ToyVideoPipeline) -> None:
    backend = LocalBackend()
    with Engine(pipeline, observer=backend.observer) as engine:
        with listening(backend, max_steps=9999) as url:
            backend.open(engine)
            httpx.post(url + VIDEOS, json={"prompt": "gray 1", **LONG})
            wait_until(lambda: engine.stats().running == 1)
        # Counted a moment after it has ended.
        counted = 'max_diffusion_request_seconds_count{state="cancelled"} 1.0'
        wait_until(lambda: counted in backend.observer.text().decode())
        assert engine.stats().running == 0


def test_keys(pipeline: ToyVideoPipeline) -> None:
    with served(pipeline, api_keys=("sk-v",)) as server:
        one = f"{server.url}{VIDEOS}/video_0"
        for method, url in (
            ("POST", server.url + VIDEOS),
            ("GET", server.url + VIDEOS),
            ("GET", one),
            ("GET", f"{one}/content"),
            ("DELETE", one),
            ("POST", f"{one}/remix"),
        ):
            response = httpx.request(method, url)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-v") as good:
            assert ended(good, create(good)).status == "completed"


# Pages of all jobs.


def test_jobs_are_listed_a_page_at_a_time(pipeline: ToyVideoPipeline) -> None:
    with served(pipeline) as server:
        settings: Any = {"base_url": f"{server.url}/v1", "api_key": "none"}
        with openai.OpenAI(**settings, max_retries=0) as client:
            made = [create(client, prompt=f"gray {n}").id for n in range(5)]
            assert [v.id for v in client.videos.list(order="asc")] == made
            assert [v.id for v in client.videos.list(limit=2)] == made[::-1]  # 3 pages
            page = client.videos.list(limit=2, order="asc", after=made[1])
            assert [v.id for v in page.data] == made[2:4]
            assert (page.has_more, page.last_id) == (True, made[3])
            page = client.videos.list(limit=2, order="asc", after=made[2])
            assert (page.has_more, len(page.data)) == (False, 2)
            empty = server.get(f"{VIDEOS}?after={made[0]}").json()
            assert empty == {
                **{"object": "list", "data": [], "has_more": False},
                **{"first_id": None, "last_id": None},
            }
            for query, status, message in (
                ("limit=0", 422, "limit: input should be greater than or equal to 1"),
                ("limit=101", 422, "limit: input should be less than or equal to 100"),
                ("order=up", 422, "order: input should be 'asc' or 'desc'"),
                ("after=video_0", 404, "video_0 is not here, or no longer"),
            ):
                response = server.get(f"{VIDEOS}?{query}")
                assert response.status_code == status
                assert message in response.json()["error"]["message"]


# What is kept.


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, [0, 1, 2]),
        ({"max_videos": 2}, [1, 2]),
        ({"video_bytes": 1}, [2]),  # the newest stays: someone waits for it
        ({"video_seconds": 0.001}, []),
    ],
    ids=["all", "number", "bytes", "time"],
)
def test_finished_videos_are_kept_for_a_while(
    limits: dict[str, Any], kept: list[int]
) -> None:
    async def draw() -> list[int]:
        async with asking(Sketcher(video=OF_8), **limits) as client:
            found = []
            for seed in range(3):
                body = {"prompt": "x", "seed": seed}
                made = (await client.post(VIDEOS, json=body)).json()["id"]
                found.append(made)
                if "video_seconds" not in limits:
                    assert (await over(client, made))["status"] == "completed"
            if "video_seconds" in limits:
                while (await client.get(VIDEOS)).json()["data"]:
                    await asyncio.sleep(0.005)
            contents = [await client.get(f"{VIDEOS}/{i}/content") for i in found]
            assert {r.status_code for r in contents} <= {200, 404}
            return [i for i, r in enumerate(contents) if r.status_code == 200]

    assert asyncio.run(draw()) == kept


def test_jobs_that_fail_are_kept_with_their_error() -> None:
    async def draw(backend: Sketcher) -> dict[str, Any]:
        async with asking(backend) as client:
            made = (await client.post(VIDEOS, json={"prompt": "x"})).json()
            return await over(client, made["id"])

    failed = asyncio.run(draw(Sketcher(video=OF_8, failure=MaxDiffusionError("step"))))
    assert failed["status"] == "failed"
    assert failed["error"] == {"code": "engine_error", "message": "step"}
    assert failed["progress"] == 99  # all steps, and no video


def test_a_refusal_at_once_is_no_job() -> None:
    async def draw() -> tuple[httpx.Response, Any]:
        backend = Sketcher(video=OF_8, refusal=RequestError("request: seed must be x"))
        async with asking(backend) as client:
            response = await client.post(VIDEOS, json={"prompt": "x"})
            return response, (await client.get(VIDEOS)).json()["data"]

    response, jobs = asyncio.run(draw())
    assert (response.status_code, jobs) == (400, [])
    assert response.json()["error"]["param"] == "seed"


@pytest.mark.parametrize("name", ["video_bytes", "max_videos", "video_seconds"])
def test_limits_are_checked(name: str) -> None:
    limits: Any = {name: 0}
    with pytest.raises(RequestError, match=f"server: {name} must be"):
        ServerSettings(**limits)


# Seconds and frames.


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, (9, 8.0, "1.125")),
        ({"num_frames": 17}, (17, 8.0, "2.125")),
        ({"seconds": "4"}, (33, 8.0, "4.125")),  # 32, and the one that ends them
        ({"seconds": 2}, (17, 8.0, "2.125")),
        ({"seconds": "4.125"}, (33, 8.0, "4.125")),
        ({"seconds": "1", "fps": 16}, (17, 16.0, "1.0625")),
        ({"seconds": "1.0625", "fps": 16, "num_frames": 17}, (17, 16.0, "1.0625")),
        ({"seconds": 25 / 24, "fps": 24}, (25, 24.0, "1.04167")),  # 16 decimals
        ({"seconds": None, "num_frames": None, "input_reference": None}, None),
    ],
)
@pytest.mark.parametrize("is_form", [False, True])
def test_seconds_are_frames(body: dict[str, Any], told: Any, is_form: bool) -> None:
    sketcher = Sketcher(video=OF_8)
    fields: Any = {k: (None, str(v)) for k, v in body.items() if v is not None}
    sent: Any = {"json": {"prompt": "x", **body}}
    if is_form:
        sent = {"files": {"prompt": (None, "x"), **fields}}
    response = asyncio.run(ask(sketcher, "POST", VIDEOS, **sent))
    assert response.status_code == 200, response.text
    video = response.json()
    count, fps, seconds = told or (9, 8.0, "1.125")
    assert (video["num_frames"], video["fps"], video["seconds"]) == (
        *(count, fps),
        seconds,
    )
    [(request, options)] = sketcher.drawn
    assert request.options.get("num_frames", 9) == count
    assert options.emits_steps


# What is refused.


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (
            {"seconds": "3.3"},
            *(400, "seconds"),
            "seconds: '3.3' at 8 frames a second is 26.4 frames, which are not "
            'drawn here; nearest: "3.125" (25 frames) or "4.125" (33 frames)',
        ),
        (
            {"seconds": "12"},
            *(400, "seconds"),
            "seconds: '12' at 8 frames a second is 96 frames, which are not "
            'drawn here; nearest: "4.125" (33 frames)',
        ),
        ({"seconds": "0"}, 400, "seconds", 'nearest: "1.125" (9 frames)'),
        ({"seconds": "4", "fps": 7}, 400, "seconds", "is 28 frames, which are not"),
        (
            {"seconds": "4", "num_frames": 17},
            *(400, "seconds"),
            "seconds: num_frames 17 at 8 a second is 2.125 seconds, got '4'; leave one "
            "out",
        ),
        ({"seconds": "four"}, 422, "seconds", "got 'four'; write it as \"4\" or"),
        ({"seconds": -1}, 422, "seconds", "seconds: string should match pattern"),
        ({"seconds": True}, 422, "seconds", "should be a valid string, got true"),
        ({"seconds": 10**400}, 422, "seconds", 'write it as "4" or "4.125"'),
        ({"seconds": 1e300}, 422, "seconds", "got '1e+300'; write it as \"4\" or"),
        (  # with all of its digits
            {"seconds": 3.1250049, "fps": 120},
            *(400, "seconds"),
            "seconds: '3.1250049' at 120 frames a second is 375.001 frames, which",
        ),
        (
            {"num_frames": 1},
            *(400, "num_frames"),
            "num_frames: a video has 2 or more, got 1; POST /v1/images/generations "
            "draws pictures",
        ),
        ({"num_frames": 0}, 422, "num_frames", "greater than or equal to 1, got 0"),
        ({"fps": 1000}, 422, "fps", "less than or equal to 120, got 1000"),
        (
            {"size": "big"},
            422,
            "size",
            "expected WIDTHxHEIGHT in pixels, or auto for the model's own, got 'big'",
        ),
        ({"size": "9999x64"}, 400, "size", "at most 2048 pixels a side, got 9999"),
        ({"steps": 201}, 400, "steps", "at most 200 steps, got 201"),
        ({"timeout": 601}, 400, "timeout", "at most 600 seconds, got 601"),
        ({"prompt": ""}, 422, "prompt", "at least 1 character"),
        ({"prompt": "x" * 32_001}, 400, "prompt", "at most 32000 characters"),
        ({"model": "sora-2"}, 404, "model", "'sora-2' is not served here; expected"),
        ({"cache": "nothing"}, 400, "cache", "nothing"),
        ({"cache_options": {"order": 1}}, 400, "cache_options", "of which cache?"),
        (
            {"input_reference": {"image_url": "data:,"}},
            *(400, "input_reference"),
            "input_reference: no model here starts from a picture or a video; leave it "
            "out, and describe it in the prompt",
        ),
        ({"n": 2}, 422, "n", "n: no such field; a job draws one video; post another;"),
        ({"stream": True}, 422, "stream", "GET /v1/videos/ID tells the progress"),
        ({"second": "4"}, 422, "second", "no such field; did you mean seconds?"),
    ],
)
def test_a_bad_value_is_named(
    body: dict[str, Any], status: int, param: str, message: str
) -> None:
    found, error = refused({"prompt": "x", **body})
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "body: expected JSON ("),
        (b"", "application/json", 400, "body: expected JSON ("),
        (b"[1]", "application/json", 422, "body: expected a JSON object, got [1]"),
        (b"[" * 20_000, "application/json", 400, "nest less"),
        (b"{}", "application/json", 422, "prompt: field required"),
        (b"{}", "text/plain", 422, "application/json or multipart/form-data"),
        (b"x", "multipart/form-data; boundary=b", 400, "it has no end"),
        (b"{}" + b" " * 300_000, "application/json", 413, "at most 262144 bytes"),
    ],
)
def test_a_malformed_body_is_refused(
    content: bytes, kind: str, status: int, message: str
) -> None:
    headers = {"Content-Type": kind}
    found, error = refused(None, content=content, headers=headers)
    assert found == status
    assert message in error["message"]


def test_files_are_refused_by_name(client: openai.OpenAI) -> None:
    file = ("x.png", b"\x89PNG\xff\0", "image/png")
    with pytest.raises(openai.BadRequestError, match="input_reference: no model here"):
        client.videos.create(prompt="x", input_reference=file)
    body = {"prompt": (None, "x"), "mask": file}
    response = asyncio.run(ask(Sketcher(video=OF_8), "POST", VIDEOS, files=body))
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("mask: expected no file")


def test_what_the_model_refuses_is_no_job(client: openai.OpenAI) -> None:
    for fields, message in (
        ({"num_frames": 10}, "num_frames must be at most 9, got 10"),
        ({"size": "7x6"}, "must be a multiple of 2"),
        ({"prompt": "gray 300"}, "must name a gray of 0 to 255"),
        ({"max_sequence_length": 9}, "max_sequence_length is no option of"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            create(client, **fields)


@pytest.mark.parametrize("path", ["video_0/remix", "edits", "extensions", "characters"])
def test_what_openai_has_beside_is_refused(path: str) -> None:
    response = asyncio.run(ask(Sketcher(), "POST", f"{VIDEOS}/{path}", json={}))
    assert response.status_code == 400
    what = path.rpartition("/")[2]
    assert response.json()["error"]["message"] == (
        f"{what}: these models draw videos from text alone, and read none; POST "
        "/v1/videos draws a new one"
    )


def test_each_path_names_the_other() -> None:
    status, error = refused({"prompt": "x"}, Sketcher())
    assert (status, error["param"]) == (400, "model")
    assert error["message"] == (
        "model: the one that is served draws pictures, not videos; POST "
        "/v1/images/generations draws one"
    )
    backend = Sketcher(video=OF_8)
    for body, count in (({}, 9), ({"num_frames": 17}, 17)):
        response = post({"prompt": "x", **body}, backend)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == (
            f"model: the one that is served would draw a video of {count} frames, and "
            "images alone are drawn here; POST /v1/videos draws videos"
        )
    assert backend.drawn == []


def test_a_model_may_draw_both() -> None:
    """Images unless a request says otherwise."""
    both = VideoDescription(num_frames=1, fps=8.0, counts=(2, 3))
    assert post({"prompt": "x"}, Sketcher(video=both)).status_code == 200
    assert post({"prompt": "x", "num_frames": 2}, Sketcher(video=both)).json()["error"]
    _, error = refused({"prompt": "x"}, Sketcher(video=both))
    assert "a video has 2 or more, got 1" in error["message"]
    body = {"prompt": "x", "num_frames": 3}
    made = asyncio.run(ask(Sketcher(video=both), "POST", VIDEOS, json=body)).json()
    assert (made["num_frames"], made["seconds"]) == (3, "0.375")


def test_a_single_frame_is_an_image(server: Served) -> None:
    response = server.post(prompt="gray 9", num_frames=1)
    assert response.status_code == 200
    assert response.json()["size"] == "6x4"


def test_every_field_of_openais_client_is_known() -> None:
    known = {*field_names(VideoRequest), *VideoRequest.others}
    assert set(get_type_hints(VideoCreateParams)) <= known
    theirs, ours = openai.types.Video.model_fields, Video.model_fields
    assert set(theirs) <= set(ours)
    assert theirs["status"].annotation == ours["status"].annotation


def test_the_card_says_what_videos_there_are(server: Served) -> None:
    [card] = server.get("/v1/models").json()["data"]
    assert card["video"] == {
        "num_frames": 3,
        "fps": 8.0,
        "frame_counts": [2, 3, 4, 5, 6, 7, 8, 9],
    }
    assert {"num_frames", "fps"} <= set(card["options"])


# The page of the documentation.

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = [(kind, text) for kind, text in BLOCKS if "videos" in text]


@pytest.mark.parametrize(("kind", "text"), EXAMPLES, ids=[k for k, _ in EXAMPLES])
def test_the_examples(server: Served, tmp_path: Path, kind: str, text: str) -> None:
    code = text.replace("http://127.0.0.1:8000", server.url)
    code = code.replace("a paper boat", "gray 90").replace("python3", sys.executable)
    # What CogVideoX takes, as the toy does.
    code = re.sub(r'"num_frames": \d+', '"num_frames": 4', code)
    words = ["bash", "-euo", "pipefail"] if kind == "bash" else [sys.executable]
    done = run(*words, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    frames, _ = decoded((tmp_path / "boat.mp4").read_bytes())
    assert len(frames) == 4
    assert np.abs(frames.astype(int) - 90).max() <= 3
