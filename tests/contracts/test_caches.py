"""What every cache promises, a row per method and configuration, on a random FLUX.1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cache_rows import PROMPTS, ROWS, STEPS, Row
from max.driver import Buffer
from pictures import psnr

from max_diffusion import (
    AbstractCacheConfig,
    AutoConfig,
    DiffusionPipelineOutput,
    FasterCacheConfig,
    FirstBlockConfig,
    GenerationRequest,
    NoCacheConfig,
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    TextToImagePipeline,
)
from max_diffusion.caches import POLICIES, Action, FirstBlockCache, Run
from max_diffusion.execution.graph_call import run

NAMES = [row.name for row in ROWS]


def draw(
    flux: TextToImagePipeline,
    config: AbstractCacheConfig,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 5,
) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    result = flux.generate(prompts, seed=seed, num_inference_steps=STEPS, cache=config)
    return result.images, [record.actions for record in result.report.steps]


@pytest.mark.parametrize("row", [r for r in ROWS if r.computed], ids=lambda r: r.name)
def test_full_passes_equal_the_documented_rule(
    flux: TextToImagePipeline, row: Row
) -> None:
    _, actions = draw(flux, row.config)
    computed = [s for s, step in enumerate(actions) if step == (Action.COMPUTE,) * 3]
    assert computed == list(row.computed or ())
    assert sum(step.count(Action.COMPUTE) for step in actions) == 3 * len(computed)


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.computed is None], ids=lambda r: r.name
)
def test_some_steps_are_skipped_and_some_computed(
    flux: TextToImagePipeline, row: Row
) -> None:
    _, actions = draw(flux, row.config)
    passes = sum(step.count(Action.COMPUTE) for step in actions)
    assert 3 < passes < 3 * STEPS


@pytest.mark.parametrize("row", [r for r in ROWS if r.off], ids=lambda r: r.name)
def test_turned_off_it_computes_all_and_changes_nothing(
    flux: TextToImagePipeline, row: Row
) -> None:
    plain, _ = draw(flux, NoCacheConfig())
    assert row.off is not None
    images, actions = draw(flux, row.off)
    assert actions == [(Action.COMPUTE,) * 3] * STEPS
    assert np.array_equal(images, plain)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_sample_does_not_depend_on_its_batch(
    flux: TextToImagePipeline, row: Row
) -> None:
    request = GenerationRequest(
        prompts=PROMPTS, seed=5, num_inference_steps=STEPS, cache=row.config
    )
    whole = flux.create_context(request)
    batch = flux.execute(flux.prepare_inputs(whole))
    for index in range(3):
        part = slice(index, index + 1)
        alone = replace(
            whole,
            tokens={name: ids[part] for name, ids in whole.tokens.items()},
            latents=whole.latents[part],
        )
        output = flux.execute(flux.prepare_inputs(alone))
        assert [r.actions[0] for r in output.steps] == [
            r.actions[index] for r in batch.steps
        ]
        assert psnr(output.images[0], batch.images[index]) >= 60


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_requests_leave_nothing_to_each_other(
    flux: TextToImagePipeline, row: Row
) -> None:
    """In a row, after one that was aborted, and one within the steps of another."""
    wanted, actions = draw(flux, row.config)
    other, _ = draw(flux, row.config, PROMPTS[:2], seed=8)

    def abort(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    def interleave(done: int, total: int) -> None:
        if done in (3, 8):
            within, _ = draw(flux, row.config, PROMPTS[:2], seed=8)
            assert np.array_equal(within, other)

    settings: dict[str, Any] = {
        "seed": 5,
        "num_inference_steps": STEPS,
        "cache": row.config,
    }
    with pytest.raises(KeyboardInterrupt):
        flux.generate(PROMPTS, on_step=abort, **settings)
    again = flux.generate(PROMPTS, on_step=interleave, **settings)
    assert np.array_equal(again.images, wanted)
    assert [record.actions for record in again.report.steps] == actions


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_state_takes_the_bytes_that_were_told(
    flux: TextToImagePipeline, row: Row
) -> None:
    assert flux.denoiser is not None
    for negative in (None, "a red circle"):
        result = flux.generate(
            PROMPTS,
            negative_prompt=negative,
            true_cfg_scale=1.0 if negative is None else 2.0,
            num_inference_steps=STEPS,
            cache=row.config,
        )
        context = flux.create_context(GenerationRequest(prompts=PROMPTS))
        shape = (*context.latents.shape[:2], context.text_tokens)
        sizes = flux.denoiser.sizes.of(shape, 1 if negative is None else 2)
        told, held = row.config.state_bytes(sizes), result.report.cache_bytes
        assert held == told if row.is_full else held < told


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.is_guided_alike], ids=lambda r: r.name
)
def test_guidance_branches_have_states_of_their_own(
    flux: TextToImagePipeline, row: Row
) -> None:
    """With the prompt as its own negative, guidance changes nothing."""
    images, actions = draw(flux, row.config, PROMPTS[:1])
    guided = flux.generate(
        PROMPTS[0],
        negative_prompt=PROMPTS[0],
        true_cfg_scale=1.5,
        seed=5,
        num_inference_steps=STEPS,
        cache=row.config,
    )
    assert psnr(guided.images, images) >= 60
    for branch in ("conditional", "unconditional"):
        records = [r for r in guided.report.steps if r.branch == branch]
        assert [record.actions for record in records] == actions


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_sizes_prompts_and_batches_need_no_compile(
    flux: TextToImagePipeline, row: Row
) -> None:
    before = flux.compile_count
    for height, width, prompts in ((8, 12, PROMPTS[:2]), (20, 8, ("x " * 9,))):
        result = flux.generate(
            prompts,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            cache=row.config,
        )
        assert result.images.shape == (len(prompts), height, width, 3)
        assert result.images.dtype == np.uint8
        if row.computed is not None:
            assert result.report.full_passes == len(row.computed) * len(prompts)
    assert flux.compile_count == before


@pytest.mark.parametrize(
    "make",
    [
        lambda threshold: FirstBlockConfig(threshold, back_blocks=2),
        lambda threshold: FirstBlockConfig(threshold, front_blocks=2, tail_order=1),
        lambda threshold: TeaCacheConfig(threshold, coefficients=(1.0, 0.0)),
    ],
    ids=["dual-block", "two-in-front", "teacache"],
)
def test_a_batch_that_computes_in_part_is_each_sample_alone(
    flux: TextToImagePipeline, make: Callable[[float], AbstractCacheConfig]
) -> None:
    def run(cache: AbstractCacheConfig, rows: slice) -> DiffusionPipelineOutput:
        request = GenerationRequest(
            prompts=PROMPTS, seed=5, num_inference_steps=STEPS, cache=cache
        )
        whole = flux.create_context(request)
        part = replace(
            whole,
            tokens={name: ids[rows] for name, ids in whole.tokens.items()},
            latents=whole.latents[rows],
        )
        return flux.execute(flux.prepare_inputs(part))

    # A threshold between the samples' changes at step 1, whatever the random weights.
    signals = sorted(run(make(0.0), slice(3)).steps[1].signal or ())
    config = make((signals[0] + signals[-1]) / 2)
    batch = run(config, slice(3))
    actions = np.array([record.actions for record in batch.steps])
    assert any(len(set(row)) > 1 for row in actions)  # in one step, some and not others
    for index in range(3):
        alone = run(config, slice(index, index + 1))
        assert [r.actions[0] for r in alone.steps] == list(actions[:, index])
        assert np.array_equal(alone.images[0], batch.images[index])


def test_tolerance_orders_passes_and_errors(flux: TextToImagePipeline) -> None:
    plain, _ = draw(flux, NoCacheConfig())
    passes, quality = [], []
    for tolerance in (1e-3, 0.55, 5.0):
        images, actions = draw(flux, AutoConfig(tolerance=tolerance, warmup_steps=2))
        passes.append(sum(step.count(Action.COMPUTE) for step in actions))
        quality.append(psnr(images, plain))
    assert passes[0] > passes[1] > passes[2]
    assert quality[0] > quality[1] > quality[2]


def test_fastercache_estimates_the_unconditional_branch(
    flux: TextToImagePipeline,
) -> None:
    config = FasterCacheConfig(attention_max_timestep=700, guidance_max_timestep=700)
    result = flux.generate(
        PROMPTS,
        negative_prompt="heart",
        true_cfg_scale=2.0,
        num_inference_steps=STEPS,
        cache=config,
    )
    done: dict[str, list[str]] = {"conditional": [], "unconditional": []}
    for record in result.report.steps:
        assert len(set(record.actions)) == 1
        done[record.branch].append(record.actions[0])
    # Below 700 from step 5 on; multiples of 5 run both branches in full.
    estimated = (6, 7, 8, 9, 11)
    for step in range(STEPS):
        is_estimated = step in estimated
        expected = "estimate" if is_estimated else "compute"
        assert done["unconditional"][step] == expected
        # Attention is extrapolated at odd steps, and only then.
        is_partial = is_estimated and step % 2 == 1
        assert done["conditional"][step] == ("partial" if is_partial else "compute")


def test_every_policy_runs(flux: TextToImagePipeline) -> None:
    for policy in POLICIES:
        config = StepMaskConfig(compute_steps=policy)
        _, actions = draw(flux, config, PROMPTS[:1])
        computed = {s for s, step in enumerate(actions) if step == (Action.COMPUTE,)}
        assert computed == config.required_steps(STEPS)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            TaylorSeerConfig(4, 3, 2),
            TaylorSeerConfig(4, 3, 2, coefficients="newton"),
        ),
        (
            AutoConfig(tolerance=9, max_order=2),
            AutoConfig(tolerance=9, max_order=2, coefficients="newton"),
        ),
        (
            StepMaskConfig(compute_steps="ultra", max_order=2),
            StepMaskConfig(compute_steps="ultra", max_order=2, coefficients="newton"),
        ),
        (
            FirstBlockConfig(1e9, warmup_steps=3),
            FirstBlockConfig(1e9, warmup_steps=3, tail_order=1),
        ),
        (
            FirstBlockConfig(1e9, warmup_steps=3, tail_order=2),
            FirstBlockConfig(1e9, 3, tail_order=2, coefficients="newton"),
        ),
    ],
    ids=["taylorseer", "auto", "step-mask", "tail", "tail-newton"],
)
def test_the_series_is_the_one_asked_for(
    flux: TextToImagePipeline, first: AbstractCacheConfig, second: AbstractCacheConfig
) -> None:
    assert not np.array_equal(draw(flux, first)[0], draw(flux, second)[0])


def test_a_tail_is_forecast_by_its_series(flux: TextToImagePipeline) -> None:
    """Against the same sum over the tails that the graphs gave, in float64."""
    config = FirstBlockConfig(1e9, warmup_steps=3, tail_order=1)
    history = FirstBlockCache(config).create_state(Run()).tail
    rng = np.random.default_rng(3)
    tails = rng.standard_normal((2, 1, 8, 16)).astype(np.float32)
    for step, tail in enumerate(tails):
        history.push(Buffer.from_numpy(tail), step)
    wanted = 3 * tails[1].astype(np.float64) - 2 * tails[0]
    assert (
        np.abs(run(flux.models, history.forecast(3)).to_numpy() - wanted).max() < 1e-5
    )


def test_rules_beyond_the_request_are_told_with_it(flux: TextToImagePipeline) -> None:
    cache = StepMaskConfig(compute_steps=(60,))
    request = GenerationRequest(prompts=("a",), num_inference_steps=12, cache=cache)
    with pytest.raises(RequestError, match="names step 60, but the last of 12 is 11"):
        flux.create_context(request)
