"""FLUX.2-dev against diffusers and transformers: text states, transformer, pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from flux2_dev_folder import make_flux2_dev_folder, open_flux2_dev_in_diffusers
from folders import TEST_GRAPHS, copy_folder
from max.driver import CPU
from pictures import psnr, relative, scene
from PIL import Image
from safetensors.torch import save_file

from max_diffusion import (
    AbstractCacheConfig,
    FirstBlockConfig,
    GenerationRequest,
    ModelLoadError,
    TextToImagePipeline,
    load_pipeline,
    open_model,
)
from max_diffusion.components import NO_TOKEN
from max_diffusion.core.buffers import to_device, to_numpy
from max_diffusion.execution.graph_call import run

TOLERANCE = 1e-4
PROMPTS = ["a red circle above a blue square", "naïve café — 東京 it's 42.5%!! A HEART"]
GRAPHS = [TEST_GRAPHS / "flux2"]


@dataclass(frozen=True)
class Pair:
    """The same folder here and in diffusers."""

    ours: TextToImagePipeline
    theirs: Flux2Pipeline

    def draw(
        self,
        prompt: Sequence[str],
        seed: int,
        image: Sequence[Image.Image] | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """diffusers' pictures, as uint8."""
        pictures = self.theirs(
            image=None if image is None else list(image),
            prompt=list(prompt),
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="np",
            **settings,
        ).images
        return np.round(np.clip(pictures, 0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux2_dev_folder(tmp_path_factory.mktemp("flux2-dev") / "model")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    ours = load_pipeline(folder, device="cpu", precompiled=GRAPHS, takes_pictures=True)
    return Pair(ours, open_flux2_dev_in_diffusers(folder))


def test_text_states_equal_transformers(pair: Pair) -> None:
    """Those of padding, too, which comes before texts and sees nothing."""
    texts = [*PROMPTS, "", "[INST] [IMG]x</s>\n\n\tit's 42 " * 60]
    request = GenerationRequest(tuple(texts), seed=1, height=4, width=4)
    context = pair.ours.create_context(request)
    given = context.tokens["text_encoder"]
    assert (given == NO_TOKEN).any()
    found = to_numpy(pair.ours.encode_text(context.tokens, context)["text"])
    with torch.no_grad():
        states = pair.theirs.encode_prompt(list(texts))[0].numpy()
    assert states.shape[1] == 512
    assert relative(found, states) < TOLERANCE
    # Padding first: alike in all texts, as it sees none of them.
    assert np.array_equal(found[0, :99], found[1, :99])
    assert not np.array_equal(found[0, -9:], found[1, -9:])


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "text_len"), [(1, 4, 8, 7), (2, 3, 5, 40)]
)
def test_transformer_equals_diffusers(
    pair: Pair, batch: int, rows: int, columns: int, text_len: int
) -> None:
    rng = np.random.default_rng((batch, rows, columns, text_len))
    sizes, denoiser = pair.theirs.transformer.config, pair.ours.denoiser
    assert denoiser is not None
    request = GenerationRequest(
        ("a",) * batch,
        seed=1,
        height=4 * rows,
        width=4 * columns,
        options={"max_sequence_length": text_len},
    )
    arrays = {
        "latents": rng.standard_normal((batch, rows * columns, sizes.in_channels)),
        "timestep": rng.uniform(1, 1000, batch),
        "guidance": rng.uniform(0, 9, batch),
        "text": rng.standard_normal((batch, text_len, sizes.joint_attention_dim)),
        **pair.ours.tables(pair.ours.create_context(request)),
    }
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    given = {name: to_device(x, CPU()) for name, x in arrays.items()}
    ours = to_numpy(partial(run, pair.ours.models)(denoiser.full(given)))
    shape = torch.zeros(batch, 1, rows, columns)
    with torch.no_grad():
        theirs = pair.theirs.transformer(
            hidden_states=torch.from_numpy(arrays["latents"]),
            encoder_hidden_states=torch.from_numpy(arrays["text"]),
            timestep=torch.from_numpy(arrays["timestep"]) / 1000,
            guidance=torch.from_numpy(arrays["guidance"]),
            img_ids=pair.theirs._prepare_latent_ids(shape),
            txt_ids=pair.theirs._prepare_text_ids(torch.zeros(batch, text_len, 1)),
            return_dict=False,
        )[0].numpy()
    assert relative(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((16, 32), {}),
        ((28, 20), {"guidance_scale": 1.5, "num_images_per_prompt": 2}),
        ((12, 84), {"guidance_scale": 7.0, "max_sequence_length": 133}),
    ],
)
def test_pictures_equal_diffusers(
    pair: Pair, size: tuple[int, int], settings: dict[str, Any]
) -> None:
    """Two prompts of different lengths at once."""
    given = {"height": size[0], "width": size[1], "num_inference_steps": 5, **settings}
    ours = pair.ours.generate(PROMPTS, seed=7, **given)
    theirs = pair.draw(PROMPTS, 7, **given)
    assert ours.images.std() > 5
    assert psnr(ours.images, theirs) >= 60
    other = pair.ours.generate(PROMPTS, seed=7, **(given | {"guidance_scale": 2.7}))
    assert psnr(other.images, theirs) < 50  # the guidance is of effect


def test_references_equal_diffusers(pair: Pair) -> None:
    images = [scene(64, 64), scene(65, 190, 1), scene(91, 79, 2)]
    settings: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 3}
    ours = pair.ours.generate(PROMPTS[0], image=images, seed=5, **settings)
    theirs = pair.draw(PROMPTS[:1], 5, images, **settings)
    assert psnr(ours.images, theirs) >= 60
    assert ours.report.reference_tokens == sum(
        (image.height // 4) * (image.width // 4) for image in images
    )


def test_defaults_are_diffusers(pair: Pair) -> None:
    request = GenerationRequest(("a heart",), seed=1)
    context = pair.ours.create_context(request)
    assert (context.num_inference_steps, context.guidance_scale) == (50, 4.0)
    assert (context.height, context.width) == (1024, 1024)
    assert context.negative_tokens is None
    settings: dict[str, Any] = {"height": 8, "width": 12, "num_inference_steps": 2}
    ours = pair.ours.generate(PROMPTS[0], seed=2, **settings)
    assert psnr(ours.images, pair.draw(PROMPTS[:1], 2, **settings)) >= 60


@pytest.mark.parametrize(
    "cache", ["taylorseer", FirstBlockConfig(threshold=4.0), "pab"]
)
def test_caches_skip_and_stay_close(
    pair: Pair, cache: str | AbstractCacheConfig
) -> None:
    settings: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 12}
    plain = pair.ours.generate(PROMPTS[0], seed=3, **settings)
    ours = pair.ours.generate(PROMPTS[0], seed=3, cache=cache, **settings)
    report = ours.report
    assert report.full_passes < report.total_passes == 12
    assert psnr(ours.images, plain.images) > 10


def test_a_lora_of_the_guidance_embedding(
    pair: Pair, folder: Path, tmp_path: Path
) -> None:
    """By Black Forest Labs' names, which klein has none of."""
    stem = "time_guidance_embed.guidance_embedder.linear_"
    shapes = {
        module: shape
        for module, shape in lora_files.matrices(folder, "transformer").items()
        if module.startswith(stem)
    }
    assert len(shapes) == 2
    names = {f"{stem}1": "guidance_in.in_layer", f"{stem}2": "guidance_in.out_layer"}
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        name = f"diffusion_model.{names[module]}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    path = lora_files.write(tmp_path / "x.safetensors", tensors)
    ours = load_pipeline(folder, device="cpu", precompiled=GRAPHS, loras=[path])
    settings: dict[str, Any] = {"height": 12, "width": 16, "num_inference_steps": 3}
    found = ours.generate(PROMPTS[0], seed=5, **settings).images
    transformer = pair.theirs.transformer
    embedder = transformer.time_guidance_embed.guidance_embedder
    before = {name: value.clone() for name, value in embedder.state_dict().items()}
    try:
        with torch.no_grad():
            for index, layer in enumerate((embedder.linear_1, embedder.linear_2), 1):
                name = f"diffusion_model.{names[f'{stem}{index}']}"
                up, down = (tensors[f"{name}.lora_{h}.weight"] for h in "BA")
                layer.weight += up @ down
        theirs = pair.draw(PROMPTS[:1], 5, **settings)
    finally:
        embedder.load_state_dict(before)
    assert psnr(found, theirs) >= 55
    assert psnr(found, pair.draw(PROMPTS[:1], 5, **settings)) < 50


def changed(part: str, name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / part
        known = json.loads(path.read_text())
        known.get("text_config", known)[name] = value
        path.write_text(json.dumps(known))

    return change


def replaced(part: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / part
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("transformer/config.json", "guidance_embeds", False),
            "guidance_embeds must be True for Flux2Pipeline, got False",
        ),
        (
            changed("tokenizer/tokenizer_config.json", "padding_side", "right"),
            "padding_side must be 'left', as the model was trained, got 'right'",
        ),
        (
            changed("text_encoder/config.json", "sliding_window", 64),
            "sliding_window must be false or null, got 64",
        ),
        (
            changed("text_encoder/config.json", "num_hidden_layers", 29),
            "text_encoder must have 30 layers or more, got 29",
        ),
        (
            changed("text_encoder/config.json", "rope_parameters", [1]),
            r"config.json's rope_parameters must be an object, got \[1\]",
        ),
        (
            changed("text_encoder/config.json", "rope_parameters", {"rope_theta": 0.5}),
            "text_encoder: rope_theta must be above 1, got 0.5",
        ),
        (
            changed("text_encoder/config.json", "rope_parameters", {"rope_theta": "x"}),
            "config.json's rope_theta must be a number, got 'x'",
        ),
        (
            changed("text_encoder/config.json", "model_type", "llama"),
            "model_type must be qwen2 or .* got 'llama'",
        ),
        (
            lambda folder: (folder / "text_encoder" / "config.json").write_text(
                '{"model_type": "mistral3", "text_config": "x"}'
            ),
            "config.json's text_config must be an object, got 'x'",
        ),
        (
            lambda folder: save_file({}, folder / "text_encoder/model.safetensors"),
            "text_encoder: .* weights missing: ",
        ),
        (
            replaced("tokenizer/tokenizer.json", "[INST]", "[DO]"),
            r"tokenizer: \[INST\] must be special tokens, as the model was trained",
        ),
        (
            changed("model_index.json", "_class_name", "Flux2KleinPipeline"),
            "text_encoder.*Mistral3ForConditionalGeneration",
        ),
    ],
)
def test_what_is_of_another_model_is_one_line(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    other = copy_folder(folder, tmp_path / "other")
    change(other)
    with pytest.raises(ModelLoadError, match=message) as caught:
        open_model(other, "cpu", caches=("none",))
    assert "\n" not in str(caught.value)
