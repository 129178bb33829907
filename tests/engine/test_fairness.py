"""Large steps beside small ones: each request gets as much of the device."""

from __future__ import annotations

from functools import partial

from engines import Gate, Recorder, request
from pictures import psnr

from max_diffusion import TextToImagePipeline
from max_diffusion.engine import Engine, Event, StepTaken

# Nine times the tokens of 32 x 32.
LARGE = {"height": 96, "width": 96}


def test_a_picture_beside_large_ones_has_its_share(flux: TextToImagePipeline) -> None:
    """In nine of its turns the large ones take one step, and that together."""
    taken: list[str] = []
    recorder = Recorder()
    gate = Gate()

    def note(name: str, event: Event) -> None:
        if isinstance(event, StepTaken):
            taken.append(name)
            if name == "large" and event.step == 3:
                gate(event)

    large_ones = [
        request(seed=seed, num_inference_steps=24, **LARGE) for seed in (1, 2)
    ]
    small = request(seed=3, num_inference_steps=90)
    with Engine(flux, observer=recorder) as engine:
        handles = [
            engine.submit(each, listener=partial(note, name))
            for name, each in zip(("large", "other"), large_ones, strict=True)
        ]
        assert gate.is_reached.wait(60)
        handles.append(engine.submit(small, listener=partial(note, "small")))
        gate.is_open.set()
        results = [handle.result(120) for handle in handles]
    start, stop = taken.index("small"), len(taken) - taken[::-1].index("small")
    beside = taken[start:stop]
    assert beside.count("small") == 90
    assert 9 <= beside.count("large") <= 12
    assert abs(beside.count("large") - beside.count("other")) <= 1
    together = [t for t in recorder.turns if ("transformer.full", 2) in t.batches]
    assert len(together) >= 20
    for each, result in zip((*large_ones, small), results, strict=True):
        assert psnr(result.frames, flux.draw(each).frames) >= 60


def test_sizes_that_differ_little_step_together(flux: TextToImagePipeline) -> None:
    """Up to four times the tokens nobody waits for anybody: turns have all."""
    recorder = Recorder()
    with Engine(flux, observer=recorder) as engine:
        gate = Gate()
        first = engine.submit(request(height=64, width=64), listener=gate)
        assert gate.is_reached.wait(60)
        second = engine.submit(request(num_inference_steps=4))
        gate.is_open.set()
        first.result(60)
        second.result(60)
    assert sum(turn.requests for turn in recorder.turns) == 10
    assert sum(turn.requests == 2 for turn in recorder.turns) >= 3
