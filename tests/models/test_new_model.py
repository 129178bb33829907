"""The documented contract, through the example's toy pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.engine import InferenceSession
from new_model import ToyPipeline, main

from max_diffusion import (
    AbstractCacheConfig,
    AutoConfig,
    CacheNotLoadedError,
    DenoisingCacheConfig,
    DenoisingCacheState,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockConfig,
    GenerationContext,
    GenerationRequest,
    MagCacheConfig,
    MaxDiffusionError,
    NoCacheConfig,
    PabConfig,
    RequestError,
    Run,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    TextToImagePipeline,
    load_pipeline,
    open_model,
    register_model,
)


def compiled(kind: type[ToyPipeline], toy: ToyPipeline) -> ToyPipeline:
    """The toy with another transformer; its graphs are on disk already."""
    folder = toy.pipeline_config.path
    assert folder is not None
    files = [folder / "transformer/diffusion_pytorch_model.safetensors"]
    session = InferenceSession(devices=[CPU()])
    return kind(toy.pipeline_config, session, [CPU()], files)


CACHES = [
    NoCacheConfig(),
    TaylorSeerConfig(cache_interval=3, warmup_steps=4),
    TaylorSeerConfig(cache_interval=4, warmup_steps=1, max_order=2),
    FirstBlockConfig(threshold=0.3),
]


def context(
    pipeline: ToyPipeline, gray: int, cache: AbstractCacheConfig | None = None
) -> GenerationContext:
    """A request for one 4 x 6 picture of that gray."""
    request = GenerationRequest(prompts=(f"gray {gray}",), seed=gray, cache=cache)
    return pipeline.create_context(request)


def draw(
    pipeline: ToyPipeline, gray: int, cache: AbstractCacheConfig | None = None
) -> np.ndarray:
    numbers = context(pipeline, gray, cache)
    return pipeline.execute(pipeline.prepare_inputs(numbers)).images


def test_example_draws_what_is_asked(toy: ToyPipeline) -> None:
    for gray in (0, 77, 255):
        assert np.array_equal(draw(toy, gray), np.full((1, 4, 6, 3), gray, np.uint8))


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_serving_loop_keeps_requests_apart(
    toy: ToyPipeline, cache: AbstractCacheConfig
) -> None:
    wanted = {gray: draw(toy, gray, cache) for gray in range(10, 250, 40)}

    def fail(done: int, total: int) -> None:
        if done == 6:
            raise RuntimeError("the client has left")

    served = 0
    for gray in [*wanted, *wanted]:
        broken = toy.prepare_inputs(context(toy, 255 - gray, cache=cache))
        with pytest.raises(RuntimeError, match="client"):
            toy.execute(broken, on_step=fail)
        assert np.array_equal(draw(toy, gray, cache), wanted[gray])
        served += 1
    assert served == 12


@pytest.mark.parametrize(
    ("cache", "full"),
    [
        (NoCacheConfig(), 20),
        (TaylorSeerConfig(cache_interval=5, warmup_steps=9), 11),
        (TaylorSeerConfig(cache_interval=5, warmup_steps=3), 7),
        (TaylorSeerConfig(cache_interval=1, warmup_steps=1), 20),
        (FirstBlockConfig(threshold=0.0), 20),
        (FirstBlockConfig(threshold=1e9), 1),
        (FirstBlockConfig(threshold=1e9, warmup_steps=4), 4),
        (FirstBlockConfig(threshold=1e9, max_consecutive_cached=3), 5),
    ],
    ids=str,
)
def test_full_passes_equal_the_documented_count(
    toy: ToyPipeline, cache: AbstractCacheConfig, full: int
) -> None:
    output = toy.execute(toy.prepare_inputs(context(toy, 9, cache=cache)))
    actions = [record.actions for record in output.steps]
    assert actions.count(("compute",)) == full


def test_state_bytes_are_what_the_method_holds(toy: ToyPipeline) -> None:
    prediction = 6 * 12 * 4
    for cache, held in (
        (NoCacheConfig(), 0),
        (TaylorSeerConfig(max_order=1), 2 * prediction),
        (TaylorSeerConfig(max_order=0), prediction),
        (FirstBlockConfig(), 2 * prediction),
    ):
        output = toy.execute(toy.prepare_inputs(context(toy, 9, cache=cache)))
        assert output.cache_bytes == held


def test_run_denoising_step_by_the_documented_contract(toy: ToyPipeline) -> None:
    """A subclass that knows nothing of the split denoiser decides in its own graph."""
    seen: list[tuple[Buffer | None, Buffer | None]] = []

    class Own(ToyPipeline):
        def run_transformer(
            self, cache_state: DenoisingCacheState, **kwargs: Buffer
        ) -> tuple[Buffer, ...]:
            seen.append((cache_state.prev_residual, cache_state.prev_output))
            prediction = DiffusionPipeline.run_transformer(self, cache_state, **kwargs)
            return (kwargs["latents"], *prediction)

    pipeline = compiled(Own, toy)
    inputs = pipeline.prepare_inputs(context(pipeline, 50, cache=FirstBlockConfig()))
    images = pipeline.execute(inputs).images
    assert np.array_equal(images, np.full((1, 4, 6, 3), 50, np.uint8))
    assert len(seen) == 20
    assert seen[0] == (None, None)
    assert all(residual is not None for residual, _ in seen[1:])


class Reusing(ToyPipeline):
    """Gives the previous prediction back whenever it may."""

    def run_transformer(
        self, cache_state: DenoisingCacheState, **kwargs: Buffer
    ) -> tuple[Buffer, ...]:
        if cache_state.prev_output is not None:
            return (kwargs["latents"], cache_state.prev_output)
        prediction = DiffusionPipeline.run_transformer(self, cache_state, **kwargs)
        return (kwargs["latents"], *prediction)


def test_rules_hold_for_a_transformer_of_its_own(toy: ToyPipeline) -> None:
    cache = FirstBlockConfig(warmup_steps=3, compute_steps=(7,), compute_last=2)
    pipeline = compiled(Reusing, toy)
    numbers = context(pipeline, 9, cache=cache)
    output = pipeline.execute(pipeline.prepare_inputs(numbers))
    computed = [r.step for r in output.steps if r.actions == ("compute",)]
    assert computed == [0, 1, 2, 7, 18, 19]
    with pytest.raises(RequestError, match="tail_order has no effect on Reusing"):
        pipeline.create_cache_state(1, 6, {}, cache=FirstBlockConfig(tail_order=1))


@pytest.mark.parametrize(
    "cache",
    [
        TaylorSeerConfig(cache_interval=9, warmup_steps=2),
        AutoConfig(tolerance=1e9, warmup_steps=2),
        StepMaskConfig(compute_steps=(0,)),
        FirstBlockConfig(threshold=1e9),
        FirstBlockConfig(threshold=1e9, back_blocks=1, tail_order=1),
        MagCacheConfig(1e9, 50, 0.0, ratios=(1.0,)),
        TeaCacheConfig(1e9, coefficients=(1.0, 0.0)),
        PabConfig(99, max_timestep=2000),
        FasterCacheConfig(attention_interval=99),
        TaylorSeerConfig(cache_interval=9, warmup_steps=2, target="attention"),
    ],
    ids=lambda cache: type(cache).__name__,
)
def test_a_change_of_shape_computes(
    toy: ToyPipeline, cache: AbstractCacheConfig
) -> None:
    run = Run(9, timesteps=(500.0,) * 9)
    state = toy.create_cache_state(2, 6, {}, cache=cache, run=run)
    rng = np.random.default_rng(1)
    shapes = [(2, 6)] * 5 + [(3, 6)] * 2 + [(3, 4)] * 2
    actions = []
    for step, (batch, tokens) in enumerate(shapes):
        latents = rng.standard_normal((batch, tokens, 12)).astype(np.float32)
        prediction = toy.run_denoising_step(
            step,
            state,
            toy.device,
            latents=Buffer.from_numpy(latents),
            timestep=Buffer.from_numpy(np.full(batch, 500, np.float32)),
            text=Buffer.from_numpy(np.ones((batch, tokens, 12), np.float32)),
        )
        assert tuple(prediction.shape) == (batch, tokens, 12)
        actions.append(state.actions)
    assert actions[5] == ("compute",) * 3
    assert actions[7] == ("compute",) * 3
    assert "compute" not in actions[4]  # and it was not computing anyway


def test_teacache_compares_with_the_step_before(toy: ToyPipeline) -> None:
    """Also where that one was reused; the toy's modulated input is its latents."""
    cache = TeaCacheConfig(1e9, coefficients=(1.0, 0.0), compute_last=0)
    state = toy.create_cache_state(2, 6, {}, cache=cache)
    steps = np.random.default_rng(2).standard_normal((5, 2, 6, 12)).astype(np.float32)
    for step, latents in enumerate(steps):
        toy.run_denoising_step(
            step,
            state,
            toy.device,
            latents=Buffer.from_numpy(latents),
            timestep=Buffer.from_numpy(np.full(2, 500, np.float32)),
            text=Buffer.from_numpy(np.ones((2, 6, 12), np.float32)),
        )
        if step == 0:
            assert (state.actions, state.signal) == (("compute",) * 2, None)
            continue
        difference = np.abs(latents - steps[step - 1]).mean(axis=(1, 2))
        wanted = difference / np.abs(steps[step - 1]).mean(axis=(1, 2))
        assert state.actions == ("reuse",) * 2
        assert state.signal is not None
        assert np.allclose(state.signal, wanted, rtol=1e-5)


def test_latents_are_asked_for_by_name(toy: ToyPipeline) -> None:
    state = toy.create_cache_state(1, 6, {}, cache=TaylorSeerConfig())
    with pytest.raises(MaxDiffusionError, match=r"expected latents .* got hidden"):
        toy.run_denoising_step(0, state, toy.device, hidden=None)


def test_create_cache_state_is_per_request(toy: ToyPipeline) -> None:
    first = toy.create_cache_state(1, 6, {}, cache=TaylorSeerConfig())
    second = toy.create_cache_state(1, 6, {}, cache=TaylorSeerConfig())
    assert first.state is not second.state
    assert first.num_bytes == 0


def test_cache_settings_resolve_by_the_models_defaults(toy: ToyPipeline) -> None:
    settings = DenoisingCacheConfig(taylorseer=True, taylorseer_max_order=2)
    assert toy.caches.resolve(settings) == TaylorSeerConfig(5, 9, 2)
    settings = DenoisingCacheConfig(first_block_caching=True)
    assert toy.caches.resolve(settings) == FirstBlockConfig(0.05)


def test_nan_latents_are_said_not_drawn(toy: ToyPipeline) -> None:
    numbers = context(toy, 9)
    numbers.latents[0, 0, 0] = np.nan
    with pytest.raises(Exception, match="latents are not finite"):
        toy.execute(toy.prepare_inputs(numbers))


def test_example_main_runs(tmp_path: Path) -> None:
    lines: list[str] = []
    main(tmp_path / "toy", lines.append)
    assert lines[1] == "asked for gray 120, drew 120"


def test_graphs_that_a_request_needs_beyond_are_compiled_once(
    toy_folder: Path,
) -> None:
    events: list[tuple[str, str]] = []

    def note(stage: str, what: str) -> None:
        events.append((stage, what))

    lean = load_pipeline(toy_folder, device="cpu", on_event=note)
    at_first = lean.compile_count
    assert at_first >= 1  # the steps of its sampler may ship
    assert lean.graph_groups == {"full", "series"}
    del events[:]
    wanted = lean.generate("gray 7", seed=1).images
    assert events == []
    for _ in range(2):
        found = lean.generate("gray 7", seed=1, cache=FirstBlockConfig(0.0)).images
        assert np.array_equal(found, wanted)
        assert lean.compile_count == at_first + 1  # blocks, and what is around them
    assert events == [("compile", "start"), ("compile", "end")]
    assert lean.graph_groups == {"full", "series", "blocks"}


def test_a_model_that_may_not_be_extended_refuses(toy_folder: Path) -> None:
    lean = load_pipeline(toy_folder, device="cpu", is_extensible=False)
    with pytest.raises(
        CacheNotLoadedError, match="pab needs graphs that the model was"
    ):
        lean.generate("gray 7", cache="pab")
    assert list(lean.caches.supported()) == ["none", "taylorseer", "auto", "step-mask"]


def test_an_opened_model_checks_requests_and_compiles_nothing(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("max_diffusion.execution.compiler.CompiledGraphs.add", None)
    opened = open_model(toy_folder, device="cpu")
    with pytest.raises(RequestError, match="height must be a multiple of 2 pixels"):
        opened.create_context(GenerationRequest(prompts=("gray 1",), height=5))
    with pytest.raises(RequestError, match="must name a gray of 0 to 255"):
        opened.create_context(GenerationRequest(prompts=("red",)))
    numbers = opened.create_context(GenerationRequest(prompts=("gray 1",)))
    assert numbers.latents.shape == (1, 6, 12)
    assert opened.caches.state_bytes(TaylorSeerConfig(), (1, 6, 1)) == 2 * 6 * 12 * 4
    assert opened.compile_count == 0
    with pytest.raises(MaxDiffusionError, match="open, but not compiled; call compile"):
        opened.execute(opened.prepare_inputs(numbers))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (int, "expected a subclass of TextToImagePipeline"),
        (TextToImagePipeline, "TextToImagePipeline lacks decode, decode_bytes, draw"),
        (type("Bare", (ToyPipeline,), {"components": None}), "must have components"),
        (type("Other", (ToyPipeline,), {}), "is taken already; choose another name"),
    ],
    ids=["no pipeline", "abstract", "bare", "taken"],
)
def test_a_family_that_lacks_something_is_told(kind: Any, message: str) -> None:
    with pytest.raises(RequestError, match=f"register_model: ToyPipeline.*{message}"):
        register_model("ToyPipeline", kind)
