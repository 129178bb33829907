"""What a server allows of videos, and whose jobs they are; without a model."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import httpx
import pytest
from sketcher import Sketcher, ask, asking

from max_diffusion import GenerationRequest, MaxDiffusionError, RequestError
from max_diffusion.engine import SubmitOptions
from max_diffusion.serving.http import ServerSettings
from max_diffusion.serving.http.backend import VideoDescription
from max_diffusion.serving.http.jobs import Job, VideoJobs
from max_diffusion.serving.http.video_schemas import Video

VIDEOS = "/v1/videos"
# As of a model whose frames are one more than a multiple of 8.
OF_8 = VideoDescription(num_frames=17, fps=8.0, counts=(9, 17, 25, 33))


def begun(
    body: dict[str, Any], max_frames: int, video: VideoDescription = OF_8
) -> tuple[httpx.Response, list[Any]]:
    """The answer to a body, and the options of what was drawn."""
    sketcher, settings = Sketcher(video=video), {"max_frames": max_frames}
    body = {"prompt": "x", **body}
    asked = ask(sketcher, "POST", VIDEOS, json=body, settings=settings)
    return asyncio.run(asked), [request.options for request, _ in sketcher.drawn]


@pytest.mark.parametrize(
    ("body", "max_frames", "param", "message"),
    [
        (
            {"num_frames": 33},
            *(25, "num_frames"),
            "num_frames: this server allows at most 25 frames, got 33",
        ),
        (
            {"seconds": "4"},
            *(25, "seconds"),
            "seconds: '4' at 8 frames a second is 32 frames, which are not drawn here; "
            'nearest: "3.125" (25 frames)',
        ),
        (  # the model draws none so short
            {},
            *(8, "num_frames"),
            "num_frames: this server allows at most 8 frames, got 17",
        ),
        (
            {"seconds": "1"},
            *(8, "num_frames"),
            "num_frames: this server allows at most 8 frames, got 17",
        ),
    ],
)
def test_more_frames_than_a_server_allows_are_refused(
    body: dict[str, Any], max_frames: int, param: str, message: str
) -> None:
    answer, drawn = begun(body, max_frames)
    assert (answer.status_code, drawn) == (400, [])
    error = answer.json()["error"]
    assert (error["param"], error["message"]) == (param, message)


@pytest.mark.parametrize(
    ("body", "max_frames", "options"),
    [
        ({}, 17, {}),
        ({"num_frames": 25}, 25, {"num_frames": 25}),
        ({"seconds": "3"}, 25, {"num_frames": 25}),
        ({}, 16, {"num_frames": 9}),  # less than the model's own
        ({"num_frames": 9}, 9, {"num_frames": 9}),
    ],
)
def test_as_many_frames_as_a_server_allows_are_drawn(
    body: dict[str, Any], max_frames: int, options: dict[str, int]
) -> None:
    answer, drawn = begun(body, max_frames)
    assert (answer.status_code, drawn) == (200, [options]), answer.text
    assert answer.json()["num_frames"] == options.get("num_frames", 17)


def test_seconds_that_an_answer_tells_of_a_long_video_ask_for_as_many() -> None:
    video = VideoDescription(num_frames=1025, fps=7.0, counts=(9, 1025))
    told, _ = begun({}, 1025, video)
    assert told.json()["seconds"] == "146.429"  # of which 7 a second are 1025.003
    again, drawn = begun({"seconds": "146.429"}, 1025, video)
    assert (again.status_code, drawn) == (200, [{}]), again.text


def test_pictures_of_a_model_of_videos_are_drawn_whatever_the_limit() -> None:
    sketcher = Sketcher(video=OF_8)
    body = {"prompt": "x", "num_frames": 1}
    asked = ask(
        *(sketcher, "POST", "/v1/images/generations"),
        json=body,
        settings={"max_frames": 1},
    )
    assert asyncio.run(asked).status_code == 200


@pytest.mark.parametrize(
    ("max_frames", "counts", "own"),
    [(161, [9, 17, 25, 33], 17), (25, [9, 17, 25], 17), (10, [9], 9), (8, [], 17)],
)
def test_the_model_is_described_as_far_as_the_server_allows(
    max_frames: int, counts: list[int], own: int
) -> None:
    settings = {"max_frames": max_frames}
    asked = ask(Sketcher(video=OF_8), "GET", "/v1/models", settings=settings)
    [card] = asyncio.run(asked).json()["data"]
    assert (card["video"]["frame_counts"], card["video"]["num_frames"]) == (counts, own)


def test_the_limit_of_frames_is_checked() -> None:
    assert ServerSettings().max_frames == 161
    with pytest.raises(RequestError, match="server: max_frames must be at least 1"):
        ServerSettings(max_frames=0)


def keyed(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_jobs_are_told_of_to_the_key_that_began_them_only() -> None:
    async def run() -> None:
        keys = ("sk-one", "sk-two")
        async with asking(Sketcher(video=OF_8), api_keys=keys) as client:
            made = {}
            for key in keys:
                body = {"prompt": f"of {key}"}
                answer = await client.post(VIDEOS, json=body, headers=keyed(key))
                made[key] = answer.json()["id"]
            for key, other in (keys, keys[::-1]):
                own = keyed(key)
                page = (await client.get(VIDEOS, headers=own)).json()
                assert [each["prompt"] for each in page["data"]] == [f"of {key}"]
                assert not page["has_more"]
                path = f"{VIDEOS}/{made[other]}"
                for method, end in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
                    answer = await client.request(method, path + end, headers=own)
                    assert answer.status_code == 404
                    message = answer.json()["error"]["message"]
                    assert message.startswith(f"videos: {made[other]} is not here, or")
                after = {"after": made[other]}
                answer = await client.get(VIDEOS, params=after, headers=own)
                assert answer.status_code == 404
            for key in keys:
                path = f"{VIDEOS}/{made[key]}"
                assert (await client.get(path, headers=keyed(key))).status_code == 200
                gone = await client.delete(path, headers=keyed(key))
                assert gone.json()["deleted"] is True

    asyncio.run(run())


def job_of(number: int) -> Job:
    told = Video(
        id=f"video_{number}",
        model="demo",
        created_at=0,
        prompt="x",
        size="8x8",
        seconds="1",
        num_frames=9,
        fps=8.0,
    )
    return Job(told, has_report=False, owner=b"")


def test_jobs_that_fail_are_no_more_than_are_kept_though_nobody_asks() -> None:
    async def run() -> None:
        jobs = VideoJobs(ServerSettings(max_videos=2))
        sketcher = Sketcher(video=OF_8, failure=MaxDiffusionError("step"))
        request = GenerationRequest(prompts=("x",), seed=1)
        for number in range(5):
            job = job_of(number)
            await jobs.start(job, partial(sketcher.draw, request, SubmitOptions()))
            assert job.task is not None
            await job.task
        assert jobs.num_kept == 2

    asyncio.run(run())


@pytest.mark.parametrize("failure", [None, MaxDiffusionError("step")])
def test_what_has_ended_is_freed_though_nobody_asks(
    failure: MaxDiffusionError | None,
) -> None:
    async def run() -> None:
        jobs = VideoJobs(ServerSettings(video_seconds=0.05))
        sketcher = Sketcher(video=OF_8, failure=failure)
        request = GenerationRequest(prompts=("x",), seed=1)
        job = job_of(1)
        await jobs.start(job, partial(sketcher.draw, request, SubmitOptions()))
        assert job.task is not None
        await job.task
        assert job.video.status == ("completed" if failure is None else "failed")
        assert jobs.num_kept == 1
        await asyncio.sleep(0.2)
        assert jobs.num_kept == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "fix"),
    [
        ({"json": {"prompt": "x" * 400}}, "shorten the prompt"),
        (
            {"files": {"prompt": (None, "x" * 400)}},
            "shorten the prompt, and leave out files, which are not taken here",
        ),
    ],
)
def test_bodies_of_videos_are_no_larger_as_forms(
    body: dict[str, Any], fix: str
) -> None:
    sketcher, limits = Sketcher(video=OF_8), {"max_body_bytes": 300}
    asked = ask(sketcher, "POST", VIDEOS, settings=limits, **body)
    answer = asyncio.run(asked)
    assert (answer.status_code, sketcher.drawn) == (413, [])
    message = answer.json()["error"]["message"]
    assert message == f"body: expected at most 300 bytes; {fix}"


@pytest.mark.parametrize("name", ["model", "cache"])
def test_a_name_without_end_is_not_told_whole(name: str) -> None:
    body = {"prompt": "x", name: "x" * 5000}
    answer = asyncio.run(ask(Sketcher(video=OF_8), "POST", VIDEOS, json=body))
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == name
    assert "xxxx" in error["message"]
    assert len(error["message"]) < 400
