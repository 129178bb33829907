"""The engine: every request gets what it gets alone, and no request harms another."""

from __future__ import annotations

import time

import numpy as np
import pytest
from cache_rows import ROWS
from engines import Gate, Recorder, actions, hold, request
from pictures import psnr
from serving import wait_until

from max_diffusion import (
    GenerationRequest,
    RequestCancelled,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
)
from max_diffusion.engine import (
    DeadlineError,
    Engine,
    EngineConfig,
    Event,
    Finished,
    Preview,
    QueueFullError,
    Started,
    State,
    StepTaken,
    SubmitOptions,
)
from max_diffusion.engine.memory import MemoryPlan

PROMPTS = ("a red circle", "two green stars on a gray background", "heart")


def test_mixed_requests_equal_themselves_alone(flux: TextToImagePipeline) -> None:
    """Every cache, several sizes, steps, batches, with and without true guidance."""
    rng = np.random.default_rng(13)
    requests = []
    for index, row in enumerate(ROWS):
        height, width = ((32, 24), (32, 32), (32, 32))[rng.integers(3)]
        has_guidance = bool(rng.integers(2))
        requests.append(
            GenerationRequest(
                prompts=PROMPTS[: rng.integers(1, 4)],
                seed=index,
                height=height,
                width=width,
                # Rules name steps up to 11.
                num_inference_steps=int(rng.integers(12, 16)),
                true_cfg_scale=2.0 if has_guidance else 1.0,
                negative_prompt="blue" if has_guidance else None,
                cache=row.config,
            )
        )
    recorder = Recorder()
    with Engine(flux, observer=recorder) as engine:
        handles = [engine.submit(each) for each in requests]
        results = [handle.result(120) for handle in handles]
        assert engine.stats().reserved_bytes == 0
    for row, each, result in zip(ROWS, requests, results, strict=True):
        alone = flux.draw(each)
        assert actions(result) == actions(alone), row.name
        assert psnr(result.images, alone.images) >= 60, row.name
        assert result.report.cache_bytes == alone.report.cache_bytes
        assert result.report.cache == alone.report.cache
    together = {
        graph: max(
            samples
            for turn in recorder.turns
            for name, samples in turn.batches
            if name == graph
        )
        for graph in (
            "transformer.full",
            "transformer.block_0",
            "transformer.given_attention",
            "euler_step",
        )
    }
    assert min(together.values()) >= 4, together


def test_equal_requests_are_one_execution(flux: TextToImagePipeline) -> None:
    """Eight pictures of one size, in four requests: a step is two graphs."""
    recorder = Recorder()
    with Engine(flux, EngineConfig(max_batch=8), observer=recorder) as engine:
        gate, first = hold(engine)
        handles = [
            engine.submit(request(seed=seed, prompts=("heart", "star")))
            for seed in range(4)
        ]
        gate.is_open.set()
        for handle in (first, *handles):
            handle.result(60)
    full = [turn.batches for turn in recorder.turns if turn.samples == 8]
    assert (("transformer.full", 8), ("euler_step", 8)) in full


def test_no_batch_is_larger_than_allowed(flux: TextToImagePipeline) -> None:
    recorder = Recorder()
    config = EngineConfig(max_batch=3, max_step_samples=100)
    with Engine(flux, config, observer=recorder) as engine:
        handles = [engine.submit(request(seed=seed)) for seed in range(7)]
        large = engine.submit(request(num_images_per_prompt=5))
        for handle in (*handles, large):
            handle.result(60)
    sizes = {
        n
        for turn in recorder.turns
        for name, n in turn.batches
        if name == "transformer.full"
    }
    # One request's own pictures are never torn apart.
    assert sizes <= {1, 2, 3, 5}
    assert {3, 5} <= sizes


def test_skipped_steps_do_not_wait(flux: TextToImagePipeline) -> None:
    """A request that forecasts most steps is done in as many turns as it computes."""
    cache = TaylorSeerConfig(cache_interval=5, warmup_steps=2)
    recorder = Recorder()
    with Engine(flux, observer=recorder) as engine:
        handle = engine.submit(request(num_inference_steps=20, cache=cache))
        result = handle.result(60)
        events = list(handle.events())
    computed = sum(record.actions == ("compute",) for record in result.report.steps)
    assert computed < 10
    # And a turn for what is forecast after the last computed step.
    assert computed <= len(recorder.turns) <= computed + 1
    steps = [event.step for event in events if isinstance(event, StepTaken)]
    assert steps == list(range(1, 21))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    counted = sum(
        (turn.actions.get("taylorseer", {}).get("predict", 0))
        for turn in recorder.turns
    )
    assert counted == 20 - computed


def test_a_cancelled_request_frees_its_slot_at_the_next_step(
    flux: TextToImagePipeline,
) -> None:
    with Engine(flux) as engine:
        gate = Gate()
        long = engine.submit(request(num_inference_steps=5000), listener=gate)
        assert gate.is_reached.wait(60)
        other = engine.submit(request())
        before = engine.stats().reserved_bytes
        long.cancel()
        gate.is_open.set()
        with pytest.raises(RequestCancelled, match="cancelled"):
            long.result(60)
        assert other.result(60).images.shape == (1, 32, 32, 3)
        assert before > 0
        assert engine.stats().reserved_bytes == 0
        assert long.state is State.CANCELLED
        long.cancel()  # of no effect
        assert engine.submit(request()).result(60).report.total_passes == 6


def test_a_waiting_request_can_be_cancelled(flux: TextToImagePipeline) -> None:
    with Engine(flux, EngineConfig(max_running=1)) as engine:
        gate, first = hold(engine)
        second = engine.submit(request())
        second.cancel()
        third = engine.submit(request())
        gate.is_open.set()
        first.result(60)
        third.result(60)
        with pytest.raises(RequestCancelled):
            second.result(60)


def test_a_late_request_is_ended(flux: TextToImagePipeline) -> None:
    with Engine(flux) as engine:
        gate, first = hold(engine)
        late = engine.submit(
            request(num_inference_steps=5000), SubmitOptions(timeout=0.05)
        )
        time.sleep(0.1)
        gate.is_open.set()
        with pytest.raises(DeadlineError, match=r"not done after its 0\.05 s"):
            late.result(60)
        first.result(60)
        assert late.state is State.FAILED


def test_a_full_queue_refuses(flux: TextToImagePipeline) -> None:
    with Engine(flux, EngineConfig(max_running=1, max_queued=2)) as engine:
        gate, first = hold(engine)
        waiting = [engine.submit(request()) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already") as caught:
            engine.submit(request())
        assert caught.value.retry_after >= 1
        gate.is_open.set()
        for handle in (first, *waiting):
            handle.result(60)


def test_the_queue_is_as_short_as_it_is_said_when_memory_is_full(
    flux: TextToImagePipeline,
) -> None:
    probe = Engine(flux)
    gate, first = hold(probe)
    needed = probe.stats().reserved_bytes
    gate.is_open.set()
    first.result(60)
    probe.close()
    config = EngineConfig(max_queued=2, memory_limit=needed + 1)
    with Engine(flux, config) as engine:
        gate, first = hold(engine)
        waiting = [engine.submit(request()) for _ in range(2)]
        with pytest.raises(QueueFullError, match="at most 2 may"):
            engine.submit(request())
        gate.is_open.set()
        for handle in (first, *waiting):
            handle.result(60)


def test_a_request_larger_than_the_memory_is_refused(flux: TextToImagePipeline) -> None:
    with (
        Engine(flux, EngineConfig(memory_limit=200_000)) as engine,
        pytest.raises(RequestError, match="more than the limit of 200000"),
    ):
        engine.submit(request(num_images_per_prompt=50))


def test_requests_wait_for_memory(flux: TextToImagePipeline) -> None:
    """Two do not fit at a time, and what is reserved is never more than the limit."""
    needed = MemoryPlan(flux, 2**40).needed_by(flux.create_context(request()))
    recorder = Recorder()
    limit = needed.total + needed.held // 2
    with Engine(flux, EngineConfig(memory_limit=limit), observer=recorder) as engine:
        handles = [engine.submit(request(seed=seed)) for seed in range(3)]
        for handle in handles:
            handle.result(60)
            assert engine.stats().reserved_bytes <= limit
    assert {turn.requests for turn in recorder.turns} == {1}


def test_the_plan_covers_what_a_cache_comes_to_hold(flux: TextToImagePipeline) -> None:
    for row in ROWS:
        with Engine(flux) as engine:
            gate = Gate()
            handle = engine.submit(
                request(num_inference_steps=12, cache=row.config), listener=gate
            )
            assert gate.is_reached.wait(60)
            reserved = engine.stats().reserved_bytes
            gate.is_open.set()
            assert handle.result(60).report.cache_bytes <= reserved


def test_higher_priority_leaves_the_queue_first(flux: TextToImagePipeline) -> None:
    done: list[int] = []
    with Engine(flux, EngineConfig(max_running=1)) as engine:
        gate, first = hold(engine)
        handles = []
        for priority in (0, -1, 8, 0):

            def note(event: Event, priority: int = priority) -> None:
                if isinstance(event, Finished):
                    done.append(priority)

            options = SubmitOptions(priority=priority)
            handles.append(engine.submit(request(), options, listener=note))
        gate.is_open.set()
        for handle in (first, *handles):
            handle.result(60)
    assert done == [8, 0, 0, -1]


def test_a_long_request_does_not_starve_a_short_one(flux: TextToImagePipeline) -> None:
    """One picture a turn: the short one takes every second, not the last ones."""
    taken: list[str] = []
    config = EngineConfig(max_step_samples=1)
    with Engine(flux, config) as engine:
        gate = Gate()

        def long_listener(event: Event) -> None:
            if isinstance(event, StepTaken):
                taken.append("long")
                # What it has had before the other came does not count.
                if event.step == 20:
                    gate(event)

        long = engine.submit(request(num_inference_steps=300), listener=long_listener)
        assert gate.is_reached.wait(60)
        short = engine.submit(
            request(),
            listener=lambda e: (
                taken.append("short") if isinstance(e, StepTaken) else None
            ),
        )
        gate.is_open.set()
        short.result(60)
        long.cancel()
        with pytest.raises(RequestCancelled):
            long.result(60)
    start, stop = taken.index("short"), len(taken) - taken[::-1].index("short")
    assert taken[start:stop].count("short") == 6
    assert 4 <= taken[start:stop].count("long") <= 7


def test_priority_doubles_the_share(flux: TextToImagePipeline) -> None:
    taken: list[int] = []
    with Engine(flux, EngineConfig(max_step_samples=1)) as engine:
        gate, first = hold(engine)
        handles = []
        for priority in (0, 2):

            def note(event: Event, priority: int = priority) -> None:
                if isinstance(event, StepTaken):
                    taken.append(priority)

            handles.append(
                engine.submit(
                    request(num_inference_steps=60),
                    SubmitOptions(priority=priority),
                    listener=note,
                )
            )
        gate.is_open.set()
        for handle in (first, *handles):
            handle.result(60)
    early = taken[:50]
    assert early.count(2) > 3 * early.count(0) > 0


def test_previews_come_on_the_way(flux: TextToImagePipeline) -> None:
    with Engine(flux) as engine:
        options = SubmitOptions(num_previews=3)
        handle = engine.submit(request(num_inference_steps=8), options)
        handle.result(60)
        previews = [e for e in handle.events() if isinstance(e, Preview)]
    assert [preview.index for preview in previews] == [0, 1, 2]
    assert [preview.step for preview in previews] == [2, 4, 6]
    assert all(preview.frames.shape == (1, 1, 32, 32, 3) for preview in previews)


def test_previews_do_not_keep_others_waiting(flux: TextToImagePipeline) -> None:
    """Nobody waits to begin, or to end, behind pictures that are not finished."""
    recorder = Recorder()
    with Engine(flux, observer=recorder) as engine:
        options = SubmitOptions(num_previews=100)
        many = [
            engine.submit(request(seed=seed, num_inference_steps=400), options)
            for seed in range(8)
        ]
        wait_until(lambda: len(recorder.turns) > 20)
        before = len(recorder.turns)
        short = engine.submit(request(num_inference_steps=4))
        short.result(60)
        assert len(recorder.turns) - before < 15
        assert len(engine._executor.side_jobs.previews) <= len(many)
        for handle in many:
            handle.cancel()


def test_figures_are_those_of_now(flux: TextToImagePipeline) -> None:
    cache = TaylorSeerConfig()
    with Engine(flux) as engine:
        gate = Gate()
        long = engine.submit(
            request(num_inference_steps=5000, cache=cache), listener=gate
        )
        assert gate.is_reached.wait(60)
        gate.is_open.set()
        wait_until(lambda: engine.stats().cache_bytes > 0)
        long.cancel()
        with pytest.raises(RequestCancelled):
            long.result(60)
        assert engine.stats().cache_bytes == 0
        guided = request(true_cfg_scale=2.0, negative_prompt="blue")
        report = engine.submit(guided).result(60).report
        assert 0 < report.denoise_seconds < report.total_seconds


def test_the_last_preview_is_close_to_the_picture(demo: TextToImagePipeline) -> None:
    """They show what the picture will be, not the noise that is left in it."""
    with Engine(demo) as engine:
        options = SubmitOptions(num_previews=4)
        each = request(prompts=("a red circle",), num_inference_steps=20, seed=3)
        handle = engine.submit(each, options)
        image = handle.result(120).frames
        previews = [e.frames for e in handle.events() if isinstance(e, Preview)]
    likeness = [psnr(preview, image) for preview in previews]
    assert likeness == sorted(likeness)
    assert likeness[-1] > 25
