"""Qwen-Image against diffusers and transformers, component by component and pair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
import torch
from folders import TEST_GRAPHS
from max.driver import CPU, Buffer
from pictures import psnr, relative
from qwen_folder import open_qwen_in_diffusers

from graphs.denoiser import ModuleLevel
from graphs.rotary import image_ids, rotary_table
from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    FirstBlockConfig,
    GenerationRequest,
    MagCacheConfig,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
    load_pipeline,
)
from max_diffusion.components import CausalLMTextEncoder, PackedDecoder
from max_diffusion.core.buffers import to_device, to_numpy
from max_diffusion.denoising.denoiser import DenoiserComponent
from max_diffusion.engine import Engine
from max_diffusion.execution.graph_call import run

if TYPE_CHECKING:
    from diffusers import QwenImagePipeline

TOLERANCE = 1e-4  # relative, of every component in float32
PROMPTS = ["a red circle above a blue square", "東京 🎨, two green stars; not a heart"]
NUM_DROPPED = 34


@dataclass(frozen=True)
class Pair:
    """One model folder in both implementations."""

    ours: TextToImagePipeline
    theirs: QwenImagePipeline

    @property
    def denoiser(self) -> DenoiserComponent:
        assert self.ours.denoiser is not None
        return self.ours.denoiser

    def inputs(
        self, lengths: tuple[int, ...], rows: int, columns: int
    ) -> dict[str, np.ndarray]:
        """A batch of texts of these lengths, on a grid of tokens."""
        batch, longest = len(lengths), max(lengths)
        rng = np.random.default_rng((*lengths, rows, columns))
        config = self.theirs.transformer.config
        axes = config.axes_dims_rope
        tokens = np.arange(longest) < np.array(lengths)[:, None]
        places = max(rows // 2, columns // 2) + np.arange(longest)
        ids = image_ids(rows, columns, is_centred=True)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        return {
            "latents": normal(batch, rows * columns, config.in_channels),
            "timestep": rng.uniform(1, 1000, batch).astype(np.float32),
            "text": normal(batch, longest, config.joint_attention_dim),
            "text_mask": np.where(tokens, 0, -1e30).astype(np.float32),
            "text_rotary": rotary_table(
                np.repeat(places[:, None], 3, axis=1), axes, dtype=np.float32
            ),
            "image_rotary": rotary_table(ids, axes, dtype=np.float32),
        }

    def expected(
        self, arrays: dict[str, np.ndarray], rows: int, columns: int
    ) -> np.ndarray:
        t = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch = len(t["latents"])
        with torch.no_grad():
            return self.theirs.transformer(
                hidden_states=t["latents"],
                timestep=t["timestep"] / 1000,
                encoder_hidden_states=t["text"],
                encoder_hidden_states_mask=(t["text_mask"] == 0).long(),
                img_shapes=[[(1, rows, columns)]] * batch,
                return_dict=False,
            )[0].numpy()

    def draw(self, prompt: str | list[str], seed: int, **settings: Any) -> np.ndarray:
        """diffusers' pictures, as uint8."""
        pictures = self.theirs(
            prompt,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            **settings,
        ).images
        return (pictures * 255).round().astype(np.uint8)


@pytest.fixture(scope="session")
def pair(qwen_folder: Path) -> Pair:
    modules = TaylorSeerConfig(target="modules")  # has graphs that no default needs
    caches: tuple[str | AbstractCacheConfig, ...] = (*CACHES, modules)
    graphs = TEST_GRAPHS / "qwen-image"
    ours = load_pipeline(qwen_folder, device="cpu", caches=caches, precompiled=[graphs])
    return Pair(ours, open_qwen_in_diffusers(qwen_folder))


def on_device(arrays: dict[str, np.ndarray]) -> dict[str, Buffer]:
    return {name: to_device(array, CPU()) for name, array in arrays.items()}


# Components.


@pytest.mark.parametrize(
    ("lengths", "rows", "columns"),
    [((7,), 4, 4), ((5, 11, 1), 3, 5), ((9, 9), 7, 2), ((1,), 1, 1), ((40, 3), 5, 9)],
)
def test_transformer_equals_diffusers(
    pair: Pair, lengths: tuple[int, ...], rows: int, columns: int
) -> None:
    arrays = pair.inputs(lengths, rows, columns)
    ours = to_numpy(run(pair.ours.models, pair.denoiser.full(on_device(arrays))))
    assert relative(ours, pair.expected(arrays, rows, columns)) < TOLERANCE


def test_a_text_beside_longer_ones_is_as_alone(pair: Pair) -> None:
    """Whatever stands in the padding after it."""
    arrays = pair.inputs((5, 11), 3, 5)
    together = to_numpy(run(pair.ours.models, pair.denoiser.full(on_device(arrays))))
    arrays["text"][0, 5:] = 100
    again = to_numpy(run(pair.ours.models, pair.denoiser.full(on_device(arrays))))
    assert np.array_equal(again, together)
    alone = {
        name: x[:1] if name in ("latents", "timestep") else x[:1, :5]
        for name, x in arrays.items()
        if not name.endswith("rotary")
    }
    alone["text_rotary"] = arrays["text_rotary"][:, :5]
    alone["image_rotary"] = arrays["image_rotary"]
    single = to_numpy(run(pair.ours.models, pair.denoiser.full(on_device(alone))))
    assert relative(together[:1], single) < 1e-5


def test_blocks_one_by_one_equal_full(pair: Pair) -> None:
    go, denoiser = partial(run, pair.ours.models), pair.denoiser
    given = on_device(pair.inputs((5, 11), 3, 5))
    full = to_numpy(go(denoiser.full(given)))
    start = go(denoiser.embed(given))
    last = go(denoiser.run_blocks(start, 0, denoiser.num_blocks))
    assert relative(to_numpy(go(denoiser.output(last))), full) < 1e-5


@pytest.mark.parametrize("level", get_args(ModuleLevel))
def test_known_modules_take_the_place_of_computed_ones(
    pair: Pair, level: ModuleLevel
) -> None:
    go, denoiser = partial(run, pair.ours.models), pair.denoiser
    given = on_device(pair.inputs((5, 11), 3, 5))
    full = to_numpy(go(denoiser.full(given)))
    taken, values = go(denoiser.run_and_take(given, level))
    for found in (taken, go(denoiser.run_given(given, level, values))):
        assert relative(to_numpy(found), full) < 1e-5


def test_text_states_equal_transformers(pair: Pair) -> None:
    """Of texts of several lengths at once, and as diffusers cuts them."""
    texts = [*PROMPTS, "", " ", "<|im_start|>\n\n\tit's 42 " * 30]
    tokenizer = pair.ours._tokenizer  # type: ignore[attr-defined]
    ids = tokenizer.encode(texts, NUM_DROPPED + 1024).ids
    encoder = pair.ours.loaded["text_encoder"]
    assert isinstance(encoder, CausalLMTextEncoder)
    ours = to_numpy(encoder.encode(np.maximum(ids, 0)))
    with torch.no_grad():
        states, mask = pair.theirs._get_qwen_prompt_embeds(texts)
    assert np.array_equal(mask.numpy() == 1, ids[:, NUM_DROPPED:] >= 0)
    for found, wanted, is_token in zip(ours, states.numpy(), mask == 1, strict=True):
        assert relative(found[is_token], wanted[is_token]) < TOLERANCE


@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 4, 4), (2, 3, 5)])
def test_decoder_equals_diffusers(
    pair: Pair, batch: int, rows: int, columns: int
) -> None:
    vae, config = pair.theirs.vae, pair.theirs.vae.config
    channels = config.z_dim
    rng = np.random.default_rng(rows)
    packed = rng.standard_normal((batch, rows * columns, 4 * channels), np.float32)
    decoder = pair.ours.loaded["vae"]
    assert isinstance(decoder, PackedDecoder)
    ours = to_numpy(decoder.decode(to_device(packed, CPU()), rows, columns))
    cells = packed.reshape(batch, rows, columns, channels, 2, 2)
    latents = cells.transpose(0, 3, 1, 4, 2, 5).reshape(
        batch, channels, 1, 2 * rows, 2 * columns
    )
    deviation, mean = (
        torch.tensor(values).view(1, channels, 1, 1, 1)
        for values in (config.latents_std, config.latents_mean)
    )
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(latents) * deviation + mean).sample
    wanted = (decoded[:, :, 0].numpy().transpose(0, 2, 3, 1) / 2 + 0.5) * 255
    assert wanted.std() > 5
    # Before rounding the bar is 1e-4 of the range: a rounding may tip over, no more.
    assert ours.shape == wanted.shape
    assert np.abs(ours - wanted).max() < 0.5 + 255 * TOLERANCE


# Whole pictures.


@pytest.mark.parametrize("size", [(24, 40), (56, 32)])
@pytest.mark.parametrize(
    "settings",
    [
        {"true_cfg_scale": 1.0},
        {"negative_prompt": " "},
        {"negative_prompt": ["a heart", "gray " * 9], "true_cfg_scale": 2.5},
    ],
    ids=["unguided", "default", "guided"],
)
def test_pictures_equal_diffusers(
    pair: Pair, size: tuple[int, int], settings: dict[str, Any]
) -> None:
    """Two prompts of different lengths at once."""
    given = {"height": size[0], "width": size[1], "num_inference_steps": 5, **settings}
    own = {k: v for k, v in given.items() if v != " "}  # what is the default here
    ours = pair.ours.generate(PROMPTS, seed=7, **own)
    if given.get("negative_prompt") == " ":
        given["negative_prompt"] = [" ", " "]
    theirs = pair.draw(PROMPTS, 7, **given)
    assert ours.images.shape == theirs.shape
    assert ours.images.std() > 5
    assert psnr(ours.images, theirs) >= 55


def test_several_pictures_of_each_prompt_equal_diffusers(pair: Pair) -> None:
    """Told as so many prompts: of several, diffusers 0.42 pairs masks and texts wrong.

    It repeats texts prompt by prompt, and their masks all prompts at a time.
    """
    settings: dict[str, Any] = {"height": 24, "width": 40, "num_inference_steps": 3}
    ours = pair.ours.generate(PROMPTS, seed=7, num_images_per_prompt=2, **settings)
    each = [prompt for prompt in PROMPTS for _ in range(2)]
    theirs = pair.draw(each, 7, negative_prompt=[" "] * 4, **settings)
    assert psnr(ours.images, theirs) >= 55
    one = pair.ours.generate(PROMPTS[0], seed=7, num_images_per_prompt=2, **settings)
    given: dict[str, Any] = {"negative_prompt": " ", "num_images_per_prompt": 2}
    theirs = pair.draw(PROMPTS[0], 7, **given, **settings)
    assert psnr(one.images, theirs) >= 55


def test_a_long_prompt_is_cut_as_in_diffusers_and_that_is_said(pair: Pair) -> None:
    prompt = "a red circle " * 5000 + "and a heart"
    settings: dict[str, Any] = {"height": 24, "width": 24, "num_inference_steps": 2}
    limits: list[dict[str, Any]] = [{}, {"max_sequence_length": 17}]
    for limit in limits:
        ours = pair.ours.generate(prompt, seed=1, **settings, **limit)
        theirs = pair.draw(prompt, 1, negative_prompt=" ", **settings, **limit)
        assert psnr(ours.images, theirs) >= 55
        length = limit.get("max_sequence_length", 512)
        (note,) = ours.report.warnings
        assert f"prompt 1 is longer than {length} tokens and was cut" in note
        assert len(note) < 200
        assert ours.report.text_tokens == length
        assert ours.report.options == {"max_sequence_length": length}


def test_defaults_are_the_models(pair: Pair) -> None:
    context = pair.ours.create_context(
        GenerationRequest(("a heart",), seed=1, height=24, width=24)
    )
    assert (context.num_inference_steps, context.true_cfg_scale) == (50, 4.0)
    assert context.negative_tokens is not None
    assert pair.ours.default_size == (1328, 1328)
    assert context.sigmas[-2:].tolist() == pytest.approx([0.02, 0], rel=1e-5)
    assert context.defaults["negative_prompt"] == "model card"


def test_requests_of_different_lengths_draw_the_same_in_an_engine(pair: Pair) -> None:
    requests = [
        GenerationRequest(
            (prompt,), seed=3, height=24, width=40, num_inference_steps=4, cache=cache
        )
        for prompt in PROMPTS
        for cache in (None, FirstBlockConfig(0.5))
    ]
    with Engine(pair.ours) as engine:
        jobs = [engine.submit(request) for request in requests]
        drawn = [job.result().images for job in jobs]
    for request, images in zip(requests, drawn, strict=True):
        assert np.array_equal(images, pair.ours.draw(request).images)


# Caches.


@contextmanager
def computed_steps(
    pipeline: QwenImagePipeline, config: object
) -> Iterator[dict[str, list[int]]]:
    """Steps that computed the last block's attention, by branch."""
    transformer, branch = pipeline.transformer, [""]
    found: dict[str, list[int]] = {"cond": [], "uncond": []}
    enter = transformer.cache_context

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        branch[0] = name
        with enter(name):
            yield

    hook = transformer.transformer_blocks[-1].attn.to_q.register_forward_hook(
        lambda *_: found[branch[0]].append(pipeline.scheduler.step_index or 0)
    )
    transformer.cache_context = entered
    transformer.enable_cache(config)
    try:
        yield found
    finally:
        transformer.disable_cache()
        hook.remove()
        del transformer.cache_context


def cache_cases() -> dict[str, tuple[AbstractCacheConfig, Any]]:
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
    from diffusers.hooks.mag_cache import MagCacheConfig as TheirMagCache

    lite = TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=3,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    ones = torch.ones(12)
    return {
        **{
            f"first-block-{threshold}": (
                FirstBlockConfig(threshold),
                FirstBlockCacheConfig(threshold),
            )
            for threshold in (0.8, 0.9, 1.0, 1.2)
        },
        "taylorseer-lite": (
            TaylorSeerConfig(cache_interval=3, warmup_steps=3, max_order=1),
            lite,
        ),
        "magcache": (
            MagCacheConfig(ratios=(1.0,) * 12),
            TheirMagCache(num_inference_steps=12, mag_ratios=ones),
        ),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", cache_cases())
def test_steps_and_pictures_of_caches_equal_diffusers(pair: Pair, name: str) -> None:
    config, theirs = cache_cases()[name]
    settings: dict[str, Any] = {"num_inference_steps": 12, "height": 24, "width": 40}
    ours = pair.ours.generate(PROMPTS[1], seed=3, cache=config, **settings)
    with computed_steps(pair.theirs, theirs) as wanted:
        pictures = pair.draw(PROMPTS[1], 3, negative_prompt=" ", **settings)
    for branch, steps in wanted.items():
        name = branch + "itional"
        found = [
            record.step
            for record in ours.report.steps
            if record.branch == name and record.actions == ("compute",)
        ]
        assert found == steps
        assert len(found) < 12
    assert psnr(ours.images, pictures) >= 40


@pytest.mark.parametrize(
    "cache", ["pab", TaylorSeerConfig(2, 2, target="modules")], ids=["pab", "modules"]
)
def test_module_caches_of_a_batch_equal_single_pictures(
    pair: Pair, cache: str | AbstractCacheConfig
) -> None:
    settings: dict[str, Any] = {
        "num_inference_steps": 8,
        "height": 24,
        "width": 40,
        "cache": cache,
    }
    both = pair.ours.generate(PROMPTS, seed=[3, 4], **settings)
    for place, prompt in enumerate(PROMPTS):
        alone = pair.ours.generate(prompt, seed=3 + place, **settings)
        assert {r.actions for r in alone.report.steps} == {("compute",), ("partial",)}
        assert psnr(alone.images[0], both.images[place]) >= 55


# What is refused, of folders in test_qwen_folders.py.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 36}, "height must be a multiple of 8 pixels, got 36"),
        ({"max_sequence_length": 1025}, "max_sequence_length"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"prompt_2": "a star"}, "prompt_2 is what a second text encoder"),
        (
            {"negative_prompt_2": "a star", "negative_prompt": ""},
            "QwenImagePipeline has none",
        ),
    ],
)
def test_bad_requests_are_refused(
    pair: Pair, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pair.ours.generate("a heart", seed=1, **settings)
