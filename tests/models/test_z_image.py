"""Z-Image against diffusers and transformers, component by component and whole."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cross_compile
import numpy as np
import processes
import pytest
import torch
from folders import TEST_GRAPHS, copy_folder
from max.driver import CPU
from pictures import psnr, relative
from z_image_folder import make_z_image_folder, open_z_image_in_diffusers

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    FirstBlockConfig,
    GenerationRequest,
    ModelLoadError,
    PabConfig,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
    load_pipeline,
    open_model,
)
from max_diffusion.components import NO_TOKEN, CausalLMTextEncoder
from max_diffusion.core.buffers import to_device, to_numpy
from max_diffusion.core.grid import Grid
from max_diffusion.denoising.denoiser import DenoiserComponent
from max_diffusion.engine import Engine
from max_diffusion.execution.graph_call import run

if TYPE_CHECKING:
    from diffusers import ZImagePipeline

TOLERANCE = 1e-4  # relative, of every component in float32
# The second is more than 32 tokens long, with those around it.
PROMPTS = [
    "a red circle",
    "東京 🎨, two green stars; not a heart, not even a small one",
]


@dataclass(frozen=True)
class Pair:
    """One model folder in both implementations."""

    ours: TextToImagePipeline
    theirs: ZImagePipeline

    @property
    def denoiser(self) -> DenoiserComponent:
        assert self.ours.denoiser is not None
        return self.ours.denoiser

    def draw(self, prompt: str | list[str], seed: int, **settings: Any) -> np.ndarray:
        """diffusers' pictures, as uint8."""
        given = list(prompt) if isinstance(prompt, list) else prompt
        scale = settings.pop("true_cfg_scale", 6.0) - 1
        pictures = self.theirs(
            given,  # which it changes
            generator=torch.Generator("cpu").manual_seed(seed),
            guidance_scale=scale,
            output_type="np",
            **settings,
        ).images
        return np.round(np.clip(pictures, 0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="session")
def z_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_z_image_folder(tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="session")
def pair(z_image_folder: Path) -> Pair:
    modules = TaylorSeerConfig(target="modules")
    ours = load_pipeline(
        z_image_folder,
        device="cpu",
        caches=(*CACHES, modules),
        precompiled=[TEST_GRAPHS / "z-image"],
    )
    return Pair(ours, open_z_image_in_diffusers(z_image_folder))


def test_text_states_equal_transformers(pair: Pair) -> None:
    texts = [*PROMPTS, "", "<|im_start|>\n\n\tit's 42 " * 60]
    ids = pair.ours._tokenizer.encode(texts, 512).ids  # type: ignore[attr-defined]
    encoder = pair.ours.loaded["text_encoder"]
    assert isinstance(encoder, CausalLMTextEncoder)
    ours = to_numpy(encoder.encode(np.maximum(ids, 0)))
    with torch.no_grad():
        states = pair.theirs._encode_prompt(list(texts))
    for found, row, wanted in zip(ours, ids, states, strict=True):
        assert relative(found[row != NO_TOKEN], wanted.numpy()) < TOLERANCE


@pytest.mark.parametrize(
    ("lengths", "rows", "columns"),
    [((7,), 4, 8), ((5, 40, 1), 3, 5), ((32, 33), 7, 2), ((1,), 1, 1), ((64, 3), 5, 9)],
)
def test_transformer_equals_diffusers(
    pair: Pair, lengths: tuple[int, ...], rows: int, columns: int
) -> None:
    """Images that need filling up or not, texts that do, and one beside longer ones."""
    rng = np.random.default_rng((*lengths, rows, columns))
    sizes, config = pair.theirs.transformer.config, pair.denoiser
    batch, tokens = len(lengths), rows * columns
    filled = np.array([-(-length // 32) * 32 for length in lengths])
    missing, longest = -tokens % 32, int(filled.max())
    place = np.arange(longest)
    text = rng.standard_normal((batch, longest, sizes.cap_feat_dim), np.float32)
    mask = np.zeros((batch, missing + longest), np.float32)
    mask[:, missing:][place >= filled[:, None]] = -1e30
    tables = pair.ours._positions(  # type: ignore[attr-defined]
        filled, longest, Grid(1, rows, columns)
    )
    channels = sizes.in_channels
    latents = rng.standard_normal((batch, channels, 2 * rows, 2 * columns), np.float32)
    packed = latents.reshape(batch, channels, rows, 2, columns, 2)
    packed = packed.transpose(0, 2, 4, 1, 3, 5).reshape(batch, tokens, 4 * channels)
    timestep = rng.uniform(1, 1000, batch).astype(np.float32)
    counts = np.array(lengths)[:, None]
    arrays = {
        "latents": packed,
        "timestep": timestep,
        "text": text,
        "text_filling": ((place >= counts) & (place < filled[:, None])).astype("f4"),
        "text_mask": mask,
        "text_rotary": tables[0],
        "image_rotary": tables[1],
    }
    given = {
        name: to_device(np.ascontiguousarray(x), CPU()) for name, x in arrays.items()
    }
    go = partial(run, pair.ours.models)
    ours = to_numpy(go(config.full(given)))
    with torch.no_grad():
        found = pair.theirs.transformer(
            [torch.from_numpy(x)[:, None] for x in latents],
            (1000 - torch.from_numpy(timestep)) / 1000,
            [
                torch.from_numpy(x[:length])
                for x, length in zip(text, lengths, strict=True)
            ],
            return_dict=False,
        )[0]
    theirs = -torch.stack(found)[:, :, 0].numpy()
    theirs = theirs.reshape(batch, channels, rows, 2, columns, 2)
    theirs = theirs.transpose(0, 2, 4, 1, 3, 5).reshape(packed.shape)
    assert relative(ours, theirs) < TOLERANCE
    # Blocks one by one, and with attention that is known.
    start = go(config.embed(given))
    last = go(config.run_blocks(start, 0, config.num_blocks))
    assert relative(to_numpy(go(config.output(last))), ours) < 1e-5
    _, values = go(config.run_and_take(given, "attention"))
    found = go(config.run_given(given, "attention", values))
    assert relative(to_numpy(found), ours) < 1e-5


@pytest.mark.parametrize("size", [(16, 32), (28, 20), (12, 84)])
@pytest.mark.parametrize(
    "settings",
    [
        {"true_cfg_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"negative_prompt": ["a heart", "gray " * 40], "true_cfg_scale": 3.5},
    ],
    ids=["unguided", "default", "guided"],
)
def test_pictures_equal_diffusers(
    pair: Pair, size: tuple[int, int], settings: dict[str, Any]
) -> None:
    """Two prompts of different lengths at once."""
    given = {"height": size[0], "width": size[1], "num_inference_steps": 5, **settings}
    ours = pair.ours.generate(PROMPTS, seed=7, **given)
    theirs = pair.draw(PROMPTS, 7, **given)
    assert ours.images.shape == theirs.shape
    assert ours.images.std() > 5
    assert psnr(ours.images, theirs) >= 55


def test_a_long_prompt_is_cut_as_in_diffusers_and_that_is_said(pair: Pair) -> None:
    prompt = "a red circle " * 5000 + "and a heart"
    settings: dict[str, Any] = {"height": 12, "width": 12, "num_inference_steps": 2}
    limits: list[dict[str, Any]] = [{}, {"max_sequence_length": 45}]
    for limit in limits:
        ours = pair.ours.generate(prompt, seed=1, **settings, **limit)
        theirs = pair.draw(prompt, 1, **settings, **limit)
        assert psnr(ours.images, theirs) >= 55
        length = limit.get("max_sequence_length", 512)
        (note,) = ours.report.warnings
        assert f"prompt 1 is longer than {length} tokens and was cut" in note
        assert ours.report.options == {"max_sequence_length": length}


def test_defaults_are_diffusers(pair: Pair) -> None:
    context = pair.ours.create_context(
        GenerationRequest(("a heart",), seed=1, height=12, width=12)
    )
    assert (context.num_inference_steps, context.true_cfg_scale) == (50, 6.0)
    assert context.negative_tokens is not None
    assert pair.ours.default_size == (1024, 1024)


@pytest.mark.parametrize(
    "cache",
    [FirstBlockConfig(2.0), PabConfig(), TaylorSeerConfig(2, 2, target="modules")],
    ids=["first-block", "pab", "modules"],
)
def test_requests_of_different_lengths_draw_the_same_in_an_engine(
    pair: Pair, cache: AbstractCacheConfig
) -> None:
    settings: dict[str, Any] = {"height": 12, "width": 20, "num_inference_steps": 8}
    requests = [
        GenerationRequest((prompt,), seed=seed, cache=cache, **settings)
        for seed, prompt in enumerate([*PROMPTS, "a heart"])
    ]
    with Engine(pair.ours) as engine:
        handles = [engine.submit(request) for request in requests]
        together = [handle.result() for handle in handles]
    for request, result in zip(requests, together, strict=True):
        alone = pair.ours.generate(
            request.prompts[0], seed=request.seed, cache=cache, **settings
        )
        assert alone.report.full_passes < alone.report.total_passes
        assert result.report.full_passes == alone.report.full_passes
        assert psnr(result.images, alone.images) >= 60


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("transformer", {"siglip_feat_dim": 8}, "editing"),
        ("transformer", {"all_patch_size": [2, 4]}, "all_patch_size must be"),
        ("transformer", {"n_kv_heads": 1}, "n_kv_heads must be n_heads = 3, got 1"),
        ("transformer", {"axes_dims": [4, 6, 8]}, "must add up to dim / n_heads = 16"),
        ("transformer", {"cap_feat_dim": 44}, "are they of one model"),
        ("text_encoder", {"model_type": "llama"}, "model_type must be"),
    ],
)
def test_configurations_of_other_models_are_refused(
    z_image_folder: Path,
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = copy_folder(z_image_folder, tmp_path / "copy")
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelLoadError, match=message):
        open_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 22}, "height must be a multiple of 4 pixels, got 22"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
    ],
)
def test_bad_requests_are_refused(
    pair: Pair, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pair.ours.generate("a heart", seed=1, **settings)


def test_graphs_build_for_a_gpu(z_image_folder: Path) -> None:
    script = cross_compile.__file__
    done = processes.run(sys.executable, script, z_image_folder, "build")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
