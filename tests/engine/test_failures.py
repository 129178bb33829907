"""What fails, ends early or is refused: it harms nobody else, and everyone is told."""

from __future__ import annotations

import pytest
from engines import Breaking, Recorder, hold, request
from pictures import psnr
from processes import run_python

from max_diffusion import (
    DeviceError,
    MaxDiffusionError,
    NoCacheConfig,
    RequestCancelled,
    RequestError,
    TextToImagePipeline,
)
from max_diffusion.engine import (
    Engine,
    EngineConfig,
    EngineObserver,
    EngineStoppedError,
    Event,
    Finished,
    State,
    StepTaken,
    SubmitOptions,
    TurnRecord,
    executor,
)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("kernel exploded"), MaxDiffusionError, "kernel exploded"),
        (ValueError("Memory allocation failed: 8"), DeviceError, "out of memory"),
    ],
    ids=["defect", "memory"],
)
def test_a_step_that_fails_ends_its_request_alone(
    flux: TextToImagePipeline,
    error: Exception,
    kind: type[MaxDiffusionError],
    words: str,
) -> None:
    good = request(seed=1)
    bad = request(seed=2, true_cfg_scale=2.0, negative_prompt="blue")
    broken = Breaking(flux.models, "transformer.full", error)
    broken.bad_sum = float(flux.create_context(bad).latents.sum())
    recorder = Recorder()
    with Engine(flux, observer=recorder) as engine:
        engine._executor.batcher._models = broken
        gate, first = hold(engine)
        handles = [engine.submit(good), engine.submit(bad), engine.submit(good)]
        gate.is_open.set()
        with pytest.raises(kind, match=words):
            handles[1].result(60)
        first.result(60)
        alone = flux.draw(good)
        for handle in (handles[0], handles[2]):
            assert psnr(handle.result(60).images, alone.images) >= 60
        assert engine.is_alive
        assert engine.stats().reserved_bytes == 0
    assert recorder.ends.count(State.FAILED) == 1


def test_an_engine_that_fails_says_so_to_all(
    flux: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(event: Event) -> None:
        raise SystemExit

    engine = Engine(flux, EngineConfig(max_running=2))
    gate, first = hold(engine)
    deaf = engine.submit(request(), listener=fail)
    waiting = engine.submit(request())
    monkeypatch.setattr(executor, "choose", lambda *_: 1 / 0)
    gate.is_open.set()
    for handle in (first, deaf, waiting):
        with pytest.raises(MaxDiffusionError, match="has failed and stopped: division"):
            handle.result(60)
    assert not engine.is_alive
    assert engine.stats().reserved_bytes == 0
    with pytest.raises(EngineStoppedError):
        engine.submit(request())
    engine.close()


def test_a_failing_observer_harms_nobody(flux: TextToImagePipeline) -> None:
    class Broken(EngineObserver):
        def on_turn(self, record: TurnRecord) -> None:
            raise ZeroDivisionError("a defect")

        def on_end(self, state: State, seconds: float) -> None:
            raise ZeroDivisionError("a defect")

    with Engine(flux, observer=Broken()) as engine:
        assert engine.submit(request()).result(60).images.shape == (1, 32, 32, 3)
        assert engine.is_alive


def test_a_program_that_leaves_without_close_ends_well() -> None:
    code = """
from max_diffusion import GenerationRequest, load_pipeline
from max_diffusion.engine import Engine
engine = Engine(load_pipeline("demo", device="cpu", caches=("none", "taylorseer")))
engine.submit(GenerationRequest(prompts=("a star",), num_inference_steps=5000))
print("left")
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit()], ids=type)
def test_a_failing_listener_ends_its_request_alone(
    flux: TextToImagePipeline, error: BaseException
) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, StepTaken):
            raise error

    with Engine(flux) as engine:
        bad = engine.submit(request(), listener=fail)
        good = engine.submit(request())
        assert good.result(60).images.shape == (1, 32, 32, 3)
        with pytest.raises(RequestCancelled):
            bad.result(60)


def test_events_end_for_who_asks_again(flux: TextToImagePipeline) -> None:
    with Engine(flux) as engine:
        handle = engine.submit(request())
        assert isinstance(list(handle.events())[-1], Finished)
        assert list(handle.events()) == []


def test_close_finishes_or_cancels(flux: TextToImagePipeline) -> None:
    engine = Engine(flux, EngineConfig(max_running=1))
    handles = [engine.submit(request()) for _ in range(3)]
    engine.close()
    assert all(handle.state is State.FINISHED for handle in handles)
    with pytest.raises(EngineStoppedError, match="takes no more requests"):
        engine.submit(request())
    engine = Engine(flux, EngineConfig(max_running=1))
    gate, first = hold(engine)
    second = engine.submit(request())
    gate.is_open.set()
    engine.close(drain=False)
    assert {first.state, second.state} <= {State.CANCELLED, State.FINISHED}
    assert second.state is State.CANCELLED


def test_an_error_inside_the_context_cancels(flux: TextToImagePipeline) -> None:
    with pytest.raises(ZeroDivisionError), Engine(flux) as engine:
        handle = engine.submit(request(num_inference_steps=5000))
        raise ZeroDivisionError
    assert handle.state is State.CANCELLED


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("priority", 9, "priority must be -8 to 8, got 9"),
        ("priority", -9, "priority must be -8 to 8, got -9"),
        ("priority", True, "priority must be"),
        ("timeout", 0, "timeout must be a number of seconds above 0"),
        ("timeout", float("nan"), "timeout must be"),
        ("timeout", True, "timeout must be"),
        ("timeout", "5", "timeout must be"),
        ("emits_steps", "no", "emits_steps must be True or False, got 'no'"),
        ("num_previews", -1, "num_previews"),
        ("num_previews", 101, "num_previews"),
    ],
)
def test_bad_options_cannot_be_made(name: str, value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SubmitOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"priority": 1}, EngineConfig()], ids=repr)
def test_what_is_no_options_is_refused(
    flux: TextToImagePipeline, options: object
) -> None:
    message = f"expected a SubmitOptions, got {type(options).__name__}"
    with Engine(flux) as engine, pytest.raises(RequestError, match=message):
        engine.submit(request(), options)  # type: ignore[arg-type]


def test_what_is_no_request_is_refused(flux: TextToImagePipeline) -> None:
    with (
        Engine(flux) as engine,
        pytest.raises(RequestError, match="expected a GenerationRequest, got str"),
    ):
        engine.submit("a star")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["max_running", "max_step_samples", "max_batch", "memory_limit"]
)
def test_bad_limits_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=name):
        EngineConfig(**{name: 0})


def test_results_and_events_can_time_out(flux: TextToImagePipeline) -> None:
    with Engine(flux, EngineConfig(max_running=1)) as engine:
        gate, first = hold(engine)
        second = engine.submit(request(cache=NoCacheConfig()))
        with pytest.raises(TimeoutError, match=r"not done after 0\.01 s"):
            second.result(0.01)
        with pytest.raises(TimeoutError, match="no event"):
            next(second.events(0.01))
        with pytest.raises(MaxDiffusionError, match="go to the listener"):
            next(first.events())
        gate.is_open.set()
        first.result(60)
