"""FLUX.1 against diffusers and transformers, component by component and whole.

Twice: the demo model, and a random folder that takes every option the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
import torch
from folders import CAPTIONS
from max.driver import CPU, Buffer
from pictures import psnr

from graphs.denoiser import ModuleLevel
from graphs.rotary import image_ids, rotary_table
from max_diffusion import (
    FirstBlockConfig,
    GenerationRequest,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
)
from max_diffusion.caches.history import relative_error
from max_diffusion.caches.kinds import Hidden
from max_diffusion.components.autoencoder_kl import AutoencoderKLDecoder
from max_diffusion.components.clip import ClipTextEncoder
from max_diffusion.components.t5 import T5TextEncoder
from max_diffusion.core.buffers import to_device, to_numpy
from max_diffusion.core.request import GenerationContext
from max_diffusion.denoising.denoiser import DenoiserComponent
from max_diffusion.execution.graph_call import run
from max_diffusion.pipelines.outputs import GenerationResult

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TOLERANCE = 1e-4  # the float32 bar of every component; outputs are of order 1


@dataclass(frozen=True)
class Pair:
    """One model folder in both implementations."""

    ours: TextToImagePipeline
    theirs: FluxPipeline

    @property
    def denoiser(self) -> DenoiserComponent:
        """Our transformer, which is a split one."""
        assert self.ours.denoiser is not None
        return self.ours.denoiser

    def inputs(
        self, batch: int, rows: int, columns: int, text_len: int
    ) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((batch, rows, columns, text_len))
        config = self.theirs.transformer.config

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        # diffusers takes sigma and multiplies by 1000 itself: only timesteps for which
        # that gives the same float32, or the two models get different inputs.
        timesteps = rng.uniform(1, 1000, 64).astype(np.float32)
        timesteps = timesteps[timesteps / 1000 * 1000 == timesteps]
        axes = config.axes_dims_rope
        arrays = {
            "latents": normal(batch, rows * columns, config.in_channels),
            "timestep": timesteps[:batch],
            "text": normal(batch, text_len, config.joint_attention_dim),
            "pooled_text": normal(batch, config.pooled_projection_dim),
            "text_rotary": rotary_table(np.zeros((text_len, 3)), axes),
            "image_rotary": rotary_table(image_ids(rows, columns), axes),
        }
        if config.guidance_embeds:
            arrays["guidance"] = rng.uniform(1, 5, batch).astype(np.float32)
        return arrays

    def expected(
        self, arrays: dict[str, np.ndarray], rows: int, columns: int
    ) -> np.ndarray:
        t = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            return self.theirs.transformer(
                hidden_states=t["latents"],
                timestep=t["timestep"] / 1000,
                guidance=t.get("guidance"),
                encoder_hidden_states=t["text"],
                pooled_projections=t["pooled_text"],
                img_ids=torch.from_numpy(image_ids(rows, columns)),
                txt_ids=torch.zeros(t["text"].shape[1], 3),
                return_dict=False,
            )[0].numpy()

    def draw(
        self, prompt: str | list[str], seed: int | list[int], **settings: Any
    ) -> np.ndarray:
        """diffusers' pictures, as uint8."""
        seeds = seed if isinstance(seed, list) else [seed]
        generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
        settings.setdefault(
            "max_sequence_length", self.theirs.tokenizer_2.model_max_length
        )
        pictures = self.theirs(
            prompt,
            generator=generators if isinstance(seed, list) else generators[0],
            output_type="np",
            **settings,
        ).images
        return (pictures * 255).round().astype(np.uint8)


@pytest.fixture(params=["random", "demo"])
def pair(request: pytest.FixtureRequest) -> Pair:
    names = {"random": ("flux", "reference"), "demo": ("demo", "demo_reference")}
    return Pair(*map(request.getfixturevalue, names[request.param]))


@pytest.fixture
def odd(flux: TextToImagePipeline, reference: FluxPipeline) -> Pair:
    return Pair(flux, reference)


def on_device(arrays: dict[str, np.ndarray]) -> dict[str, Buffer]:
    return {name: to_device(array, CPU()) for name, array in arrays.items()}


# Components.


@pytest.mark.parametrize("shape", [(1, 8, 8, 32), (3, 5, 7, 11), (2, 1, 9, 1)])
def test_transformer_equals_diffusers(
    pair: Pair, shape: tuple[int, int, int, int]
) -> None:
    arrays = pair.inputs(*shape)
    ours = to_numpy(run(pair.ours.models, pair.denoiser.full(on_device(arrays))))
    theirs = pair.expected(arrays, *shape[1:3])
    assert np.abs(theirs).max() > 0.1
    # The bar is for random weights. On trained ones the last bit of torch's float32 exp
    # counts: a frequency one bit off turns guidance 5 by 3e-4 rad. Relative there.
    is_trained = pair.theirs.transformer.config.guidance_embeds
    size = float(np.abs(theirs).max()) if is_trained else 1.0
    assert np.abs(ours - theirs).max() < TOLERANCE * size


def test_blocks_one_by_one_equal_full(odd: Pair) -> None:
    go = partial(run, odd.ours.models)
    denoiser, given = odd.denoiser, on_device(odd.inputs(2, 3, 5, 7))
    full = to_numpy(go(denoiser.full(given)))
    start = last = go(denoiser.embed(given))
    for index in range(denoiser.num_blocks):
        last = go(denoiser.run_blocks(last, index, index + 1))
    together = go(denoiser.run_blocks(start, 0, denoiser.num_blocks))
    for hidden in (last, together):
        assert np.abs(to_numpy(go(denoiser.output(hidden))) - full).max() < 1e-5


@pytest.mark.parametrize("level", get_args(ModuleLevel))
def test_known_modules_take_the_place_of_computed_ones(
    odd: Pair, level: ModuleLevel
) -> None:
    """Given what modules gave, a step gives the same; given others, another."""
    go = partial(run, odd.ours.models)
    denoiser, given = odd.denoiser, on_device(odd.inputs(2, 3, 5, 7))
    full = to_numpy(go(denoiser.full(given)))
    taken, values = go(denoiser.run_and_take(given, level))
    for found in (taken, go(denoiser.run_given(given, level, values))):
        assert np.abs(to_numpy(found) - full).max() < 1e-5
    # Each of them is read, but for those of the text alone: only through attention
    # would its stream reach the picture, and that of all blocks is given.
    for place, value in enumerate(values):
        more = [*values]
        more[place] = to_device(to_numpy(value) + 1, CPU())
        other = to_numpy(go(denoiser.run_given(given, level, more)))
        is_of_text = value.shape[1] == 7
        assert (np.abs(other - full).max() < 1e-5) == is_of_text, place
    if level == "modules":  # nothing is added
        zeros = [to_device(np.zeros(v.shape, np.float32), CPU()) for v in values]
        without = to_numpy(go(denoiser.run_given(given, level, zeros)))
        ends = to_numpy(go(denoiser.output(go(denoiser.embed(given)))))
        assert np.array_equal(without, ends)


def test_a_known_middle_is_added_to_both_streams(odd: Pair) -> None:
    """A reused step of a dual-block cache, put together from its parts in numpy."""
    go = partial(run, odd.ours.models)
    pipeline, denoiser = odd.ours, odd.denoiser
    cache = FirstBlockConfig(1e9, front_blocks=1, back_blocks=2)
    state = pipeline.create_cache_state(2, 15, {}, cache=cache)
    before = on_device(odd.inputs(2, 3, 5, 7))
    latents = np.random.default_rng(1).standard_normal((2, 15, 20), np.float32)
    now = before | {"latents": to_device(latents, CPU())}
    pipeline.run_denoising_step(0, state, CPU(), **before)
    prediction = pipeline.run_denoising_step(1, state, CPU(), **now)
    assert state.actions == ("reuse",) * 2
    old, new = (
        go(denoiser.run_blocks(go(denoiser.embed(x)), 0, 1)) for x in (before, now)
    )
    computed = go(denoiser.run_blocks(old, 1, 2))
    known = [
        to_device(to_numpy(x) + to_numpy(y) - to_numpy(z), CPU())
        for x, y, z in (
            (new.image, computed.image, old.image),
            (new.text, computed.text, old.text),
        )
    ]
    assert np.abs(to_numpy(computed.text) - to_numpy(old.text)).max() > 0.1
    last = go(denoiser.run_blocks(Hidden(known[0], known[1], new.context), 2, 4))
    wanted = to_numpy(go(denoiser.output(last)))
    assert np.abs(to_numpy(prediction) - wanted).max() < 1e-5


def test_changes_are_measured_for_each_sample(flux: TextToImagePipeline) -> None:
    go = partial(run, flux.models)
    rng = np.random.default_rng(0)
    before = rng.standard_normal((3, 15, 24)).astype(np.float32)
    now = before + rng.standard_normal((3, 15, 24)).astype(np.float32)
    change = go(relative_error(to_device(now, CPU()), to_device(before, CPU())))
    difference = np.abs(now - before).astype(np.float64).mean(axis=(1, 2))
    wanted = difference / np.abs(before).astype(np.float64).mean(axis=(1, 2))
    assert np.allclose(change, wanted, rtol=1e-5)
    zero = to_device(np.zeros_like(before), CPU())
    assert not np.isfinite(go(relative_error(zero, zero))).any()


@pytest.mark.parametrize("length", [32, 9, 3])
def test_text_encoders_equal_transformers(pair: Pair, length: int) -> None:
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    texts = [*CAPTIONS, "", "stars"]
    clip_ids = np.array(pair.theirs.tokenizer(texts, **options).input_ids, np.int64)
    t5_ids = np.array(pair.theirs.tokenizer_2(texts, **options).input_ids, np.int64)
    with torch.no_grad():
        pooled = pair.theirs.text_encoder(torch.from_numpy(clip_ids)).pooler_output
        states = pair.theirs.text_encoder_2(torch.from_numpy(t5_ids))[0]
    clip, t5 = (pair.ours.loaded[name] for name in ("text_encoder", "text_encoder_2"))
    assert isinstance(clip, ClipTextEncoder)
    assert isinstance(t5, T5TextEncoder)
    ours = to_numpy(clip.encode(clip_ids))
    assert np.abs(ours - pooled.numpy()).max() < TOLERANCE
    ours = to_numpy(t5.encode(t5_ids))
    assert np.abs(ours - states.numpy()).max() < TOLERANCE


@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 8, 8), (2, 3, 5)])
def test_decoder_equals_diffusers(
    pair: Pair, batch: int, rows: int, columns: int
) -> None:
    vae = pair.theirs.vae
    channels = vae.config.latent_channels
    rng = np.random.default_rng(rows)
    packed = rng.standard_normal((batch, rows * columns, 4 * channels), np.float32)
    decoder = pair.ours.loaded["vae"]
    assert isinstance(decoder, AutoencoderKLDecoder)
    ours = to_numpy(decoder.decode(to_device(packed, CPU()), rows, columns))
    cells = packed.reshape(batch, rows, columns, channels, 2, 2)
    latents = cells.transpose(0, 3, 1, 4, 2, 5).reshape(
        batch, channels, 2 * rows, 2 * columns
    )
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents) / scale + shift).sample.numpy()
    wanted = np.clip(decoded.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) * 255
    assert ours.shape == wanted.shape
    # Before rounding the bar is 1e-4 of the range: a rounding may tip over, no more.
    assert np.abs(ours - wanted).max() < 0.5 + 255 * TOLERANCE


# Whole pictures.


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((2, 2), {"num_inference_steps": 6}),
        ((3, 5), {"num_inference_steps": 3, "num_images_per_prompt": 2}),
        (
            (5, 3),
            {
                "num_inference_steps": 4,
                "negative_prompt": "two green stars",
                "true_cfg_scale": 2.5,
            },
        ),
    ],
)
def test_pictures_equal_diffusers(
    pair: Pair, size: tuple[int, int], settings: dict[str, Any]
) -> None:
    step = 8 * pair.theirs.vae_scale_factor
    settings |= {"height": step * size[0], "width": step * size[1]}
    if pair.theirs.transformer.config.guidance_embeds:
        settings["guidance_scale"] = 2.0
    ours = pair.ours.generate("a red circle above a blue square", seed=7, **settings)
    theirs = pair.draw("a red circle above a blue square", 7, **settings)
    assert ours.images.shape == theirs.shape
    assert ours.images.std() > 5
    assert psnr(ours.images, theirs) >= 50


SMALL: dict[str, Any] = {"height": 20, "width": 28, "num_inference_steps": 3}


def test_texts_and_seeds_of_each_picture_equal_diffusers(odd: Pair) -> None:
    prompts = ["a red circle above a blue square", "two green stars"]
    seeds = [3, 2**33 + 5, 7, 3]
    settings: dict[str, Any] = SMALL | {
        "prompt_2": ["an orange heart", ""],
        "negative_prompt": ["a gray background", "not a purple one"],
        "negative_prompt_2": ["", "stars"],
        "true_cfg_scale": 3.0,
        "num_images_per_prompt": 2,
        "max_sequence_length": 11,
    }
    ours = odd.ours.generate(prompts, seed=seeds, **settings)
    theirs = odd.draw(prompts, seeds, **settings)
    assert ours.images.shape == theirs.shape == (4, 20, 28, 3)
    for drawn, wanted in zip(ours.images, theirs, strict=True):
        assert psnr(drawn, wanted) >= 50
    report = ours.report
    assert (report.seed, report.seeds) == (3, tuple(seeds))
    assert report.options == {"max_sequence_length": report.text_tokens}
    assert report.text_tokens == report.to_dict()["max_sequence_length"] == 11
    assert report.prompt_2 == ("an orange heart", "")
    assert report.negative_prompt == ("a gray background", "not a purple one")
    direct = GenerationRequest(("a",), height=20, width=28, seeds=(9,), sigmas=(1.0,))
    assert odd.ours.draw(direct).report.seed == 9
    # Any of them again, alone.
    alone = settings | {"num_images_per_prompt": 1}
    for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
        alone[name] = settings[name][1:]
    again = odd.ours.generate(prompts[1:], seed=seeds[2], **alone)
    assert psnr(again.images[0], ours.images[2]) >= 60


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"prompt_2": "two green stars"}, {"prompt_2": ["two green stars"]}),
        ({"prompt_2": ""}, {}),
        ({"prompt_2": [""]}, {"prompt_2": [""]}),
        (
            {"negative_prompt": "a gray one", "true_cfg_scale": 2.0},
            {
                "negative_prompt": "a gray one",
                "negative_prompt_2": "",
                "true_cfg_scale": 2.0,
            },
        ),
        ({"seed": [9]}, {"seed": 9}),
    ],
    ids=lambda settings: "-".join(settings) or "without",
)
def test_ways_to_say_the_same_equal_diffusers(
    odd: Pair, settings: dict[str, Any], same: dict[str, Any]
) -> None:
    base: dict[str, Any] = SMALL | {"seed": 4}
    results = [
        odd.ours.generate("an orange heart", **base | words).images
        for words in (settings, same)
    ]
    assert np.array_equal(results[0], results[1])
    theirs = base | settings
    wanted = odd.draw("an orange heart", theirs.pop("seed"), **theirs)
    assert psnr(results[0], wanted) >= 50


def test_one_text_for_several_prompts_is_for_each(odd: Pair) -> None:
    prompts = ("an orange heart", "two green stars")
    words: dict[str, Any] = {
        "prompt_2": "circle",
        "negative_prompt": "gray",
        "true_cfg_scale": 2.0,
    }
    shared = odd.ours.generate(prompts, seed=4, **SMALL, **words).images
    each = words | {"prompt_2": ["circle"] * 2, "negative_prompt": ["gray"] * 2}
    assert np.array_equal(
        shared, odd.ours.generate(prompts, seed=4, **SMALL, **each).images
    )
    wanted = odd.draw([*prompts], 4, **SMALL, **each)
    assert psnr(shared, wanted) >= 50


def test_max_sequence_length_equals_diffusers(odd: Pair) -> None:
    drawn = {}
    for length in (1, 9, 32):
        settings = SMALL | {"max_sequence_length": length}
        ours = odd.ours.generate("two green stars", seed=1, **settings)
        assert ours.report.text_tokens == length
        drawn[length] = ours.images
        assert psnr(ours.images, odd.draw("two green stars", 1, **settings)) >= 50
    assert psnr(drawn[9], drawn[32]) < 45  # it is another picture
    default = odd.ours.generate("two green stars", seed=1, **SMALL)
    assert np.array_equal(default.images, drawn[32])


def test_a_call_for_schnell_equals_diffusers(odd: Pair) -> None:
    """Guidance 0 and four steps, the model's own number."""
    settings: dict[str, Any] = {"height": 20, "width": 28, "guidance_scale": 0.0}
    ours = odd.ours.generate("two green stars", seed=1, **settings)
    theirs = odd.draw("two green stars", 1, num_inference_steps=4, **settings)
    assert psnr(ours.images, theirs) >= 50
    assert (ours.report.warnings, ours.report.guidance_scale) == ((), None)


def test_taylorseer_equals_diffusers_lite(pair: Pair) -> None:
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=4,
        disable_cache_before_step=4,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    size = 16 * pair.theirs.vae_scale_factor
    settings = {"num_inference_steps": 20, "height": size, "width": size}
    ours = pair.ours.generate(
        "two green stars",
        seed=2,
        cache=TaylorSeerConfig(cache_interval=4, warmup_steps=4, max_order=1),
        **settings,
    )
    calls: list[int] = []
    transformer = pair.theirs.transformer
    hook = transformer.transformer_blocks[0].attn.to_q.register_forward_hook(
        lambda *_: calls.append(pair.theirs.scheduler.step_index or 0)
    )
    transformer.enable_cache(config)
    try:
        theirs = pair.draw("two green stars", 2, **settings)
    finally:
        transformer.disable_cache()
        hook.remove()
    computed = [r.step for r in ours.report.steps if r.actions == ("compute",)]
    assert computed == calls == [0, 1, 2, 3, 5, 9, 13, 17]
    assert psnr(ours.images, theirs) >= 45


# Caches.


def test_a_batch_that_computes_in_part_draws_the_same_again(
    flux: TextToImagePipeline,
) -> None:
    prompts = ("a red circle", "two green stars on a gray background", "heart")

    def context(cache: FirstBlockConfig) -> GenerationContext:
        request = GenerationRequest(
            prompts=prompts, seed=5, num_inference_steps=12, cache=cache
        )
        return flux.create_context(request)

    # A threshold between the samples' changes at step 1, whatever the random weights.
    probe = flux.execute(flux.prepare_inputs(context(FirstBlockConfig(threshold=0))))
    changes = sorted(probe.steps[1].signal or ())
    assert changes[0] < changes[-1]
    whole = context(FirstBlockConfig(threshold=(changes[0] + changes[-1]) / 2))
    batch = flux.execute(flux.prepare_inputs(whole))
    rows = np.array([record.actions for record in batch.steps])
    assert (rows == "reuse").any()
    assert any(len(set(row)) > 1 for row in rows)  # in one step, some and not others
    for _ in range(20):  # copies of rows are done before a graph reads them
        again = flux.execute(flux.prepare_inputs(whole))
        assert np.array_equal(again.images, batch.images)


@pytest.mark.parametrize("cache", ["none", "taylorseer"])
def test_branches_as_one_draw_the_same_to_the_bit(
    demo: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    def draw() -> GenerationResult:
        return demo.generate(
            "a red circle",
            negative_prompt="a star",
            true_cfg_scale=3.0,
            num_inference_steps=12,
            num_images_per_prompt=2,
            seed=1,
            cache=cache,
        )

    as_one = draw()
    monkeypatch.setattr("max_diffusion.denoising.loop._MAX_TOKENS_AS_ONE", 0)
    in_turn = draw()
    assert np.array_equal(as_one.images, in_turn.images)
    steps, others = as_one.report.steps, in_turn.report.steps
    assert [step.actions for step in steps] == [step.actions for step in others]
    computed = [step.is_time_shared for step in steps if "compute" in step.actions]
    assert computed and all(computed)
    assert not any(step.is_time_shared for step in others)


def test_a_cache_not_compiled_for_is_refused(demo: TextToImagePipeline) -> None:
    message = r"without; it has those of none, taylorseer; give it in caches at load"
    with pytest.raises(RequestError, match=message):
        demo.generate("heart", cache="first-block")
