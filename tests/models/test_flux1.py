"""FLUX.1 against diffusers and transformers, component by component and whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from max.driver import CPU

from graphs.flux1 import image_ids, rotary_table
from max_diffusion import (
    FirstBlockConfig,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
)
from max_diffusion.buffers import to_device, to_numpy

AXES = (4, 6, 6)
TOLERANCE = 1e-4  # the float32 bar of every component; outputs are of order 1


def inputs(batch: int, rows: int, columns: int, text_len: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((batch, rows, columns, text_len))

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return {
        "latents": normal(batch, rows * columns, 20),
        "timestep": rng.uniform(1, 1000, batch).astype(np.float32),
        "guidance": rng.uniform(1, 5, batch).astype(np.float32),
        "text": normal(batch, text_len, 40),
        "pooled_text": normal(batch, 24),
        "text_rotary": rotary_table(np.zeros((text_len, 3)), AXES),
        "image_rotary": rotary_table(image_ids(rows, columns), AXES),
    }


def on_device(arrays: dict[str, np.ndarray]) -> dict[str, object]:
    return {name: to_device(array, CPU()) for name, array in arrays.items()}


def expected_prediction(
    reference: object, arrays: dict[str, np.ndarray], rows: int, columns: int
) -> np.ndarray:
    t = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        return reference.transformer(
            hidden_states=t["latents"],
            timestep=t["timestep"] / 1000,
            guidance=t["guidance"],
            encoder_hidden_states=t["text"],
            pooled_projections=t["pooled_text"],
            img_ids=torch.from_numpy(image_ids(rows, columns)),
            txt_ids=torch.zeros(t["text"].shape[1], 3),
            return_dict=False,
        )[0].numpy()


@pytest.mark.parametrize("shape", [(1, 8, 8, 32), (3, 5, 7, 11), (2, 1, 9, 1)])
def test_transformer_equals_diffusers(
    flux: TextToImagePipeline, reference: object, shape: tuple[int, int, int, int]
) -> None:
    arrays = inputs(*shape)
    ours = to_numpy(flux.denoiser.full(**on_device(arrays)))
    theirs = expected_prediction(reference, arrays, *shape[1:3])
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < TOLERANCE


def test_front_and_back_equal_full(flux: TextToImagePipeline) -> None:
    given = on_device(inputs(2, 3, 5, 7))
    full = to_numpy(flux.denoiser.full(**given))
    front = flux.denoiser.front(None, **given)
    assert not np.isfinite(front.change).any()  # a zero reference must compute
    prediction, tail = flux.denoiser.back(front, **given)
    assert np.abs(to_numpy(prediction) - full).max() < 1e-5
    reused = to_numpy(flux.denoiser.reuse(front.image, tail, **given))
    assert np.abs(reused - full).max() < 1e-5


def test_front_measures_the_change_of_each_sample(flux: TextToImagePipeline) -> None:
    given = on_device(inputs(3, 3, 5, 7))
    residual = to_numpy(flux.denoiser.front(None, **given).residual)
    rng = np.random.default_rng(0)
    moved = residual + rng.standard_normal(residual.shape).astype(np.float32)
    change = flux.denoiser.front(to_device(moved, CPU()), **given).change
    difference = np.abs(residual - moved).astype(np.float64).mean(axis=(1, 2))
    wanted = difference / np.abs(moved).astype(np.float64).mean(axis=(1, 2))
    assert np.allclose(change, wanted, rtol=1e-5)


@pytest.mark.parametrize("length", [32, 9, 3])
def test_text_encoders_equal_transformers(
    flux: TextToImagePipeline, reference: object, length: int
) -> None:
    clip_tokenizer, t5_tokenizer = reference.tokenizer, reference.tokenizer_2
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    texts = ["a red circle above a blue square", "", "stars"]
    clip_ids = np.array(clip_tokenizer(texts, **options).input_ids, np.int64)
    t5_ids = np.array(t5_tokenizer(texts, **options).input_ids, np.int64)
    with torch.no_grad():
        pooled = reference.text_encoder(torch.from_numpy(clip_ids)).pooler_output
        states = reference.text_encoder_2(torch.from_numpy(t5_ids))[0]
    ours = to_numpy(flux.loaded["text_encoder"].encode(clip_ids))
    assert np.abs(ours - pooled.numpy()).max() < TOLERANCE
    ours = to_numpy(flux.loaded["text_encoder_2"].encode(t5_ids))
    assert np.abs(ours - states.numpy()).max() < TOLERANCE


@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 8, 8), (2, 3, 5)])
def test_decoder_equals_diffusers(
    flux: TextToImagePipeline, reference: object, batch: int, rows: int, columns: int
) -> None:
    rng = np.random.default_rng(rows)
    packed = rng.standard_normal((batch, rows * columns, 20), np.float32)
    ours = to_numpy(flux.loaded["vae"].decode(to_device(packed, CPU()), rows, columns))
    cells = packed.reshape(batch, rows, columns, 5, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    latents = torch.from_numpy(cells.reshape(batch, 5, 2 * rows, 2 * columns).copy())
    with torch.no_grad():
        decoded = reference.vae.decode(latents / 0.6 + 0.1).sample.numpy()
    wanted = np.clip(decoded.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) * 255
    assert ours.shape == wanted.shape
    # Before rounding the bar is 1e-4 of the range: a rounding may tip over, no more.
    assert np.abs(ours - wanted).max() < 0.5 + 255 * TOLERANCE


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def draw_reference(reference: object, **kwargs: object) -> np.ndarray:
    """diffusers' pictures for a seed, as uint8."""
    seed = kwargs.pop("seed")
    pictures = reference(
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=32,
        output_type="np",
        **kwargs,
    ).images
    return (pictures * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    "settings",
    [
        {"height": 32, "width": 32, "num_inference_steps": 6, "guidance_scale": 2.0},
        {"height": 24, "width": 40, "num_inference_steps": 3, "guidance_scale": 3.5,
         "num_images_per_prompt": 2},
        {"height": 20, "width": 28, "num_inference_steps": 4, "guidance_scale": 3.5,
         "negative_prompt": "two green stars", "true_cfg_scale": 2.5},
    ],
)  # fmt: skip
def test_pictures_equal_diffusers(
    flux: TextToImagePipeline, reference: object, settings: dict[str, object]
) -> None:
    ours = flux.generate("a red circle above a blue square", seed=7, **settings)
    theirs = draw_reference(
        reference, prompt="a red circle above a blue square", seed=7, **settings
    )
    assert ours.images.shape == theirs.shape
    assert ours.images.std() > 5
    assert psnr(ours.images, theirs) >= 50


def test_taylorseer_equals_diffusers_lite(
    flux: TextToImagePipeline, reference: object
) -> None:
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=4,
        disable_cache_before_step=4,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    ours = flux.generate(
        "two green stars",
        seed=2,
        num_inference_steps=20,
        cache=TaylorSeerConfig(cache_interval=4, warmup_steps=4, max_order=1),
    )
    calls = []
    handle = reference.transformer.transformer_blocks[
        0
    ].attn.to_q.register_forward_hook(
        lambda *_: calls.append(reference.scheduler.step_index or 0)
    )
    reference.transformer.enable_cache(config)
    try:
        theirs = draw_reference(
            reference,
            prompt="two green stars",
            seed=2,
            num_inference_steps=20,
            height=32,
            width=32,
        )
    finally:
        reference.transformer.disable_cache()
        handle.remove()
    computed = [r.step for r in ours.report.steps if r.actions == ("compute",)]
    assert computed == calls == [0, 1, 2, 3, 5, 9, 13, 17]
    assert psnr(ours.images, theirs) >= 45


def test_samples_of_a_batch_decide_alone(flux: TextToImagePipeline) -> None:
    prompts = ["a red circle", "two green stars on a gray background", "heart"]
    cache = FirstBlockConfig(threshold=0.08)
    batch = flux.generate(prompts, seed=5, num_inference_steps=12, cache=cache)
    rows = np.array([record.actions for record in batch.report.steps])
    assert (rows == "reuse").any()
    context = flux.create_context  # one picture with the batch's own noise
    from dataclasses import replace

    from max_diffusion import GenerationRequest

    whole = context(
        GenerationRequest(
            prompts=tuple(prompts), seed=5, num_inference_steps=12, cache=cache
        )
    )
    for index in range(3):
        part = slice(index, index + 1)
        alone = replace(
            whole,
            tokens=whole.tokens[part],
            tokens_2=whole.tokens_2[part],
            latents=whole.latents[part],
        )
        output = flux.execute(flux.prepare_inputs(alone))
        assert [r.actions[0] for r in output.steps] == list(rows[:, index])
        assert psnr(output.images[0], batch.images[index]) >= 60


def test_threshold_zero_computes_all_and_changes_nothing(
    flux: TextToImagePipeline,
) -> None:
    settings = {"seed": 1, "num_inference_steps": 5}
    plain = flux.generate("heart", **settings)
    cached = flux.generate("heart", cache=FirstBlockConfig(threshold=0.0), **settings)
    assert cached.report.full_passes == plain.report.full_passes == 5
    assert np.array_equal(cached.images, plain.images)


def test_nothing_recompiles(flux: TextToImagePipeline) -> None:
    for size in (32, 24, 40):
        for prompt in ("a", "a red circle above a blue square " * 3):
            flux.generate(prompt, height=size, width=36, num_inference_steps=2)
    assert flux.compile_count == 1


def test_a_long_prompt_is_cut_and_said(flux: TextToImagePipeline) -> None:
    result = flux.generate("red circle " * 5000, num_inference_steps=1)
    assert len(result.report.warnings) == 2
    assert "longer than the 32 tokens" in result.report.warnings[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 1001}, r"width must be a multiple of 4 pixels, got 1001; nearest"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "must be a whole number, got 2.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"cache": "tailor"}, "expected none, taylorseer, first-block, got 'tailor'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        ({"sigmas": [0.2, 0.9]}, "decreas"),
    ],
)
def test_bad_requests_say_what_is_wrong(
    flux: TextToImagePipeline, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        flux.generate("a", **settings)


def test_a_request_that_fails_leaves_nothing(flux: TextToImagePipeline) -> None:
    wanted = flux.generate("heart", seed=3, num_inference_steps=12, cache="taylorseer")

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux.generate("stars", num_inference_steps=12, cache="taylorseer", on_step=stop)
    again = flux.generate("heart", seed=3, num_inference_steps=12, cache="taylorseer")
    assert np.array_equal(wanted.images, again.images)
