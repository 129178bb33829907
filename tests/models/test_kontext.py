"""FLUX.1-Kontext: a reference picture as tokens, against diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_rows import ROWS
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import (
    PREFERRED_KONTEXT_RESOLUTIONS,
)
from engines import Recorder
from flux1_editing import Twins, as_pipeline, latents_of
from folders import CAPTIONS, TEST_GRAPHS
from pictures import scene, worst

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    FirstBlockConfig,
    GenerationRequest,
    PabConfig,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
    load_pipeline,
    open_model,
)
from max_diffusion.core.pictures import Picture, PictureInputs
from max_diffusion.engine import Engine, EngineConfig

BAR = 60.0
"""Decibels of every picture against diffusers'."""


@pytest.fixture(scope="module")
def kontext(
    flux_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TextToImagePipeline:
    """The random model as a Kontext: its graphs are those of FLUX.1."""
    target = tmp_path_factory.mktemp("kontext") / "model"
    return load_pipeline(
        as_pipeline(flux_folder, target, "FluxKontextPipeline"),
        device="cpu",
        caches=(*CACHES, TaylorSeerConfig(target="modules")),
        precompiled=[TEST_GRAPHS / "float32"],
        takes_pictures=True,
        is_extensible=False,
    )


@pytest.fixture(scope="module")
def random_twins(kontext: TextToImagePipeline) -> Twins:
    return Twins.of(kontext)


@pytest.fixture(scope="module")
def demo_twins(demo_kontext: TextToImagePipeline) -> Twins:
    return Twins.of(demo_kontext)


@pytest.fixture(params=["random", "demo"])
def twins(request: pytest.FixtureRequest) -> Twins:
    found = request.getfixturevalue(f"{request.param}_twins")
    assert isinstance(found, Twins)
    return found


def with_reference(
    height: int, width: int, /, *, seed: int = 0, **settings: Any
) -> GenerationRequest:
    """A request with a reference of this size, of which it keeps whole tokens."""
    picture = Picture(np.asarray(scene(height, width, seed)))
    settings["inputs"] = PictureInputs((picture,))
    settings.setdefault("options", {"auto_resize": False})
    return GenerationRequest((CAPTIONS[0],), **settings)


@pytest.mark.parametrize(
    ("picture", "drawn", "steps"),
    [((40, 56), (32, 48), 4), ((33, 97), (48, 32), 3), ((64, 32), (80, 64), 2)],
)
def test_a_reference_equals_diffusers(
    twins: Twins, picture: tuple[int, int], drawn: tuple[int, int], steps: int
) -> None:
    image = scene(*picture)
    settings: dict[str, Any] = {"height": drawn[0], "width": drawn[1]}
    settings["num_inference_steps"] = steps
    ours = twins.ours.generate(
        CAPTIONS[0], image=image, seed=5, auto_resize=False, **settings
    )
    theirs = twins.draw(CAPTIONS[0], 5, image=image, **settings)
    assert worst(ours.images, theirs) >= BAR
    report, cell = ours.report, twins.ours.cell
    assert report.reference_tokens == (picture[0] // cell) * (picture[1] // cell)
    assert report.image_tokens == (drawn[0] // cell) * (drawn[1] // cell)
    plain = twins.ours.generate(CAPTIONS[0], seed=5, **settings)
    assert worst(plain.images, theirs) < BAR - 10  # the reference was seen
    assert worst(plain.images, twins.draw(CAPTIONS[0], 5, **settings)) >= BAR


def test_latents_equal_diffusers(twins: Twins) -> None:
    """Where a picture's 8 bits would hide a difference."""
    settings: dict[str, Any] = {"height": 48, "width": 32, "num_inference_steps": 3}
    request = with_reference(32, 64, seed=6, **settings)
    ours = latents_of(twins.ours, request)
    image = scene(32, 64, 6)
    seed = request.seed
    theirs = twins.draw(
        CAPTIONS[0], seed, image=image, output_type="latent", **settings
    )
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


def test_prompts_pictures_and_guidance_equal_diffusers(twins: Twins) -> None:
    image = scene(48, 64, 1)
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "num_images_per_prompt": 2,
        "negative_prompt": ["gray", "dark"],
        "true_cfg_scale": 2.5,
        "guidance_scale": 2.0,
        "height": 32,
        "width": 48,
    }
    ours = twins.ours.generate(
        CAPTIONS[:2], image=image, seed=9, auto_resize=False, **settings
    )
    theirs = twins.draw(CAPTIONS[:2], 9, image=image, **settings)
    assert worst(ours.images, theirs) >= BAR


def test_a_seed_a_picture_is_the_picture_alone(twins: Twins) -> None:
    image = scene(32, 32, 2)
    settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 3}
    own = {**settings, "auto_resize": False}
    ours = twins.ours.generate(
        CAPTIONS[1], image=image, seed=[3, 4], num_images_per_prompt=2, **own
    )
    theirs = twins.draw(
        CAPTIONS[1], [3, 4], image=image, num_images_per_prompt=2, **settings
    )
    assert worst(ours.images, theirs) >= BAR
    alone = twins.ours.generate(CAPTIONS[1], image=image, seed=4, **own)
    assert worst(ours.images[1:], alone.images) >= BAR


# Sizes.


@pytest.mark.parametrize(
    "picture", [(300, 200), (1000, 1000), (90, 700), (411, 415), (1700, 900), (37, 38)]
)
def test_a_reference_is_scaled_as_diffusers_scales_it(
    demo_twins: Twins, picture: tuple[int, int]
) -> None:
    image, processor = scene(*picture), demo_twins.theirs.image_processor
    height, width = processor.get_default_height_width(image)
    _, width, height = min(
        (abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS
    )
    scaled = processor.preprocess(processor.resize(image, height, width), height, width)
    context = demo_twins.ours.create_context(with_reference(*picture, options={}))
    assert context.given is not None
    [reference] = context.given.references
    pixels = reference.pixels
    assert np.array_equal(pixels, scaled.numpy().transpose(0, 2, 3, 1))
    # What is drawn has that size, too, unless the request says otherwise.
    assert (context.height, context.width) == (height, width)
    assert context.reference_tokens == height * width // 16**2
    assert context.defaults["height"] == context.defaults["width"] == "image"


@pytest.mark.parametrize(
    ("asked", "area"), [((64, 32), 1024), ((40, 40), 3000), ((32, 96), 700)]
)
def test_an_area_is_kept_as_by_diffusers(
    random_twins: Twins, asked: tuple[int, int], area: int
) -> None:
    settings: dict[str, Any] = {"height": asked[0], "width": asked[1]}
    settings |= {"num_inference_steps": 1, "max_area": area}
    image = scene(32, 32)
    ours = random_twins.ours.generate(
        CAPTIONS[0], image=image, seed=2, auto_resize=False, **settings
    )
    theirs = random_twins.draw(CAPTIONS[0], 2, image=image, **settings)
    assert worst(ours.images, theirs) >= BAR
    assert ours.report.options["max_area"] == area


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [({}, (20, 28)), ({"width": 20}, (12, 20)), ({"height": 8, "width": 8}, (8, 8))],
)
def test_a_reference_that_is_not_scaled_gives_its_own_size(
    kontext: TextToImagePipeline, asked: dict[str, int], drawn: tuple[int, int]
) -> None:
    context = kontext.create_context(with_reference(21, 30, **asked))
    assert (context.height, context.width) == drawn
    assert context.reference_tokens == 5 * 7


# Graphs and caches.


def test_a_reference_needs_no_graph_of_its_own(kontext: TextToImagePipeline) -> None:
    names, count = set(kontext.models), kontext.compile_count
    for size in ((16, 16), (40, 24)):
        result = kontext.generate(
            CAPTIONS[0], image=scene(*size), num_inference_steps=1, auto_resize=False
        )
        assert result.report.reference_tokens == size[0] * size[1] // 16
    kontext.generate(CAPTIONS[0], num_inference_steps=1)
    assert set(kontext.models) == names
    assert kontext.compile_count == count


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_cache_draws_with_a_reference(
    kontext: TextToImagePipeline, row: Any
) -> None:
    settings: dict[str, Any] = {
        "image": scene(24, 32),
        "auto_resize": False,
        "height": 24,
        "width": 24,
        "num_inference_steps": 12,
        "seed": 1,
    }
    result = kontext.generate(CAPTIONS[:2], cache=row.config, **settings)
    actions = [record.actions for record in result.report.steps]
    if row.computed is not None:
        computed = tuple(i for i, each in enumerate(actions) if each[0] == "compute")
        assert computed == row.computed
    shape = 2, 6 * 6, result.report.text_tokens
    told = kontext.caches.state_bytes(row.config, shape, reference_tokens=6 * 8)
    held = result.report.cache_bytes
    assert held == told if row.is_full else held <= told
    if row.off is not None:
        plain = kontext.generate(CAPTIONS[:2], **settings)
        off = kontext.generate(CAPTIONS[:2], cache=row.off, **settings)
        assert worst(off.images, plain.images) >= BAR


def test_a_forecast_keeps_only_what_is_drawn(kontext: TextToImagePipeline) -> None:
    """So that what it is judged by is no prediction of the reference."""
    settings: dict[str, Any] = {"height": 24, "width": 24, "num_inference_steps": 6}
    cache = TaylorSeerConfig(cache_interval=2, warmup_steps=2)
    given: dict[str, Any] = {"image": scene(40, 40), "auto_resize": False}
    with_it = kontext.generate(CAPTIONS[0], cache=cache, **given, **settings)
    without = kontext.generate(CAPTIONS[0], cache=cache, **settings)
    assert with_it.report.cache_bytes == without.report.cache_bytes > 0


PEERS: dict[str, tuple[AbstractCacheConfig, Callable[[Any], Any]]] = {
    "first-block": (
        FirstBlockConfig(threshold=0.3),
        lambda _: FirstBlockCacheConfig(0.3),
    ),
    "taylorseer-attention": (
        TaylorSeerConfig(3, 4, 1, target="attention"),
        lambda _: TaylorSeerCacheConfig(
            cache_interval=3,
            disable_cache_before_step=4,
            max_order=1,
            taylor_factors_dtype=torch.float32,
        ),
    ),
    "pab": (
        PabConfig(2),
        lambda pipeline: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            current_timestep_callback=lambda: pipeline.current_timestep,
        ),
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_caches_decide_and_draw_as_diffusers(random_twins: Twins, name: str) -> None:
    cache, make_theirs = PEERS[name]
    image, theirs = scene(24, 32, 4), random_twins.theirs
    settings: dict[str, Any] = {"height": 24, "width": 24, "num_inference_steps": 16}
    ours = random_twins.ours.generate(
        CAPTIONS[0], image=image, seed=3, cache=cache, auto_resize=False, **settings
    )
    computed: list[int] = []
    probe = theirs.transformer.single_transformer_blocks[-1].attn.to_q
    hook = probe.register_forward_hook(
        lambda *_: computed.append(theirs.scheduler.step_index or 0)
    )
    theirs.transformer.enable_cache(make_theirs(theirs))
    try:
        # Of their FLUX.1 pipelines only this one does not say which branch it runs.
        with theirs.transformer.cache_context("cond"):
            drawn = random_twins.draw(CAPTIONS[0], 3, image=image, **settings)
    finally:
        theirs.transformer.disable_cache()
        hook.remove()
    steps = ours.report.steps
    assert [r.step for r in steps if r.actions[0] == "compute"] == computed
    assert 0 < len(computed) < 16
    assert worst(ours.images, drawn) >= BAR


# The engine.


def test_requests_with_other_references_run_side_by_side(
    kontext: TextToImagePipeline,
) -> None:
    """Of as many tokens too, where only their places differ."""
    settings: dict[str, Any] = {"height": 24, "width": 24, "num_inference_steps": 4}
    requests = [
        with_reference(24, 32, seed=1, **settings),
        with_reference(32, 24, seed=2, **settings),
        with_reference(24, 32, seed=3, **settings),
        with_reference(16, 16, seed=4, **settings),
        GenerationRequest((CAPTIONS[0],), **settings),
    ]
    recorder = Recorder()
    config = EngineConfig(max_batch=8, max_step_samples=8)
    with Engine(kontext, config, observer=recorder) as engine:
        handles = [engine.submit(request) for request in requests]
        results = [handle.result(60) for handle in handles]
    for request, result in zip(requests, results, strict=True):
        assert worst(result.images, kontext.draw(request).images) >= BAR
    sizes = {
        size
        for turn in recorder.turns
        for graph, size in turn.batches
        if graph == "transformer.full"
    }
    assert max(sizes) <= 2  # the two of one size; all others alone


def test_the_plan_counts_the_reference(kontext: TextToImagePipeline) -> None:
    settings: dict[str, Any] = {"height": 24, "width": 24, "num_inference_steps": 4}
    requests = (
        GenerationRequest((CAPTIONS[0],), **settings),
        with_reference(24, 24, **settings),
        with_reference(64, 64, **settings),
    )
    contexts = [kontext.create_context(request) for request in requests]
    with Engine(kontext) as engine:
        plain, *others = (engine._plan.needed_by(each).held for each in contexts)
    for needed, context in zip(others, contexts[1:], strict=True):
        assert context.given is not None
        pixels = sum(picture.pixels.nbytes for picture in context.given.to_encode)
        # Beside the picture and the noise of its latents, what its tokens take as they
        # run with the others: a stream of hidden states at the least.
        stream = 4 * 64 * context.reference_tokens
        assert needed - plain > pixels + context.latents.nbytes + stream


# What is refused.


def test_what_it_does_not_take_is_refused(
    kontext: TextToImagePipeline, flux: TextToImagePipeline
) -> None:
    image = Picture(np.asarray(scene(32, 32)))
    tiny = Picture(np.zeros((40, 3, 3), np.uint8), "tiny.png")
    for inputs, options, said in (
        (PictureInputs((image,), mask=image), {}, "mask is no input of FluxKontextPip"),
        (PictureInputs((image,), strength=0.5), {}, "strength is no input .*takes ima"),
        (PictureInputs((image, image)), {}, "image must be at most 1 .* side by side"),
        (PictureInputs((tiny,)), {}, r"image of 3 x 40 is less than the 4 pixels"),
        (PictureInputs((tiny,)), {"auto_resize": False}, "would be drawn less than 4 "),
        (
            PictureInputs((image,)),
            {"max_area": 5},
            "max_area of 5 pixels would be less",
        ),
        (None, {"max_area": 5}, "max_area of 5 pixels would be less than 4 a side"),
        (None, {"max_area": 0}, "max_area must be at least 1, got 0"),
        (None, {"auto_resize": False}, "auto_resize is of a reference picture, and "),
        (None, {"auto_resize": 1}, "auto_resize must be true or false, got 1"),
        (
            None,
            {"autoresize": True},
            "autoresize is no option .*did you mean auto_resi",
        ),
    ):
        request = GenerationRequest(("a",), inputs=inputs, options=options)
        with pytest.raises(RequestError, match=said) as caught:
            kontext.create_context(request)
        assert "\n" not in str(caught.value)
    for name in ("auto_resize", "max_area"):
        request = GenerationRequest(("a",), options={name: True})
        with pytest.raises(RequestError, match=f"{name} is no option of FluxPipeline"):
            flux.create_context(request)


def test_graphs_for_pictures_are_refused_where_they_may_not_be_compiled(
    kontext: TextToImagePipeline,
) -> None:
    folder = kontext.pipeline_config.path
    assert folder is not None
    pipeline = open_model(folder, device="cpu", is_extensible=False)
    with pytest.raises(RequestError, match="image needs graphs that were not compiled"):
        pipeline.create_context(with_reference(32, 32))
