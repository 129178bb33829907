"""FLUX.2-klein against diffusers and transformers, component by component and whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cross_compile
import numpy as np
import processes
import pytest
import torch
from flux2_folder import make_flux2_folder, open_flux2_in_diffusers
from folders import TEST_GRAPHS, copy_folder
from max.driver import CPU, Buffer
from pictures import psnr, relative, scene
from PIL import Image
from safetensors.torch import save_file

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
from max_diffusion.core.pictures import Picture, PictureInputs
from max_diffusion.denoising.denoiser import DenoiserComponent
from max_diffusion.engine import Engine
from max_diffusion.execution.graph_call import run
from max_diffusion.models.flux2.pipeline import empirical_mu

if TYPE_CHECKING:
    from diffusers import Flux2KleinPipeline

TOLERANCE = 1e-4  # relative, of every component in float32
PROMPTS = [
    "a red circle",
    "東京 🎨, two green stars; not a heart, not even a small one",
]


@dataclass(frozen=True)
class Pair:
    """One model folder in both implementations."""

    ours: TextToImagePipeline
    theirs: Flux2KleinPipeline

    @property
    def denoiser(self) -> DenoiserComponent:
        assert self.ours.denoiser is not None
        return self.ours.denoiser

    def draw(
        self,
        prompt: str | Sequence[str],
        seed: int,
        image: Sequence[Image.Image] | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """diffusers' pictures, as uint8."""
        scale = settings.pop("true_cfg_scale", 4.0)
        pictures = self.theirs(
            image=None if image is None else list(image),
            prompt=prompt if isinstance(prompt, str) else list(prompt),
            generator=torch.Generator("cpu").manual_seed(seed),
            guidance_scale=scale,
            output_type="np",
            **settings,
        ).images
        return np.round(np.clip(pictures, 0, 1) * 255).astype(np.uint8)


def opened(folder: Path) -> Pair:
    ours = load_pipeline(
        folder,
        device="cpu",
        caches=(*CACHES, TaylorSeerConfig(target="modules")),
        precompiled=[TEST_GRAPHS / "flux2"],
        takes_pictures=True,
    )
    return Pair(ours, open_flux2_in_diffusers(folder))


@pytest.fixture(scope="session")
def flux2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux2") / "base"
    return make_flux2_folder(folder, is_distilled=False)


@pytest.fixture(scope="session")
def pair(flux2_folder: Path) -> Pair:
    return opened(flux2_folder)


@pytest.fixture(scope="session")
def distilled(flux2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same weights under the other word of ``model_index.json``."""
    folder = copy_folder(flux2_folder, tmp_path_factory.mktemp("flux2") / "distilled")
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "is_distilled": True}))
    return opened(folder)


# Components.


def test_text_states_equal_transformers(pair: Pair) -> None:
    """Those of padding, too, which the transformer reads."""
    texts = [*PROMPTS, "", "<|im_start|>\n\n\tit's 42 " * 60]
    request = GenerationRequest(tuple(texts), seed=1, height=4, width=4)
    context = pair.ours.create_context(request)
    given = context.tokens["text_encoder"]
    assert (given == NO_TOKEN).any()
    assert isinstance(pair.ours.loaded["text_encoder"], CausalLMTextEncoder)
    found = pair.ours.encode_text(context.tokens, context)["text"]
    with torch.no_grad():
        states, _ = pair.theirs.encode_prompt(list(texts))
    assert states.shape[1] == 512
    assert relative(to_numpy(found), states.numpy()) < TOLERANCE


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "text_len"),
    [(1, 4, 8, 7), (2, 3, 5, 40), (3, 1, 1, 1), (1, 9, 5, 33)],
)
def test_transformer_equals_diffusers(
    pair: Pair, batch: int, rows: int, columns: int, text_len: int
) -> None:
    rng = np.random.default_rng((batch, rows, columns, text_len))
    sizes, config = pair.theirs.transformer.config, pair.denoiser
    tokens = rows * columns
    request = GenerationRequest(
        ("a",) * batch,
        seed=1,
        height=4 * rows,
        width=4 * columns,
        options={"max_sequence_length": text_len},
    )
    tables = pair.ours.tables(pair.ours.create_context(request))
    arrays = {
        "latents": rng.standard_normal((batch, tokens, sizes.in_channels)),
        "timestep": rng.uniform(1, 1000, batch),
        "text": rng.standard_normal((batch, text_len, sizes.joint_attention_dim)),
        **tables,
    }
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    given = {name: to_device(x, CPU()) for name, x in arrays.items()}
    go = partial(run, pair.ours.models)
    ours = to_numpy(go(config.full(given)))
    shape = torch.zeros(batch, 1, rows, columns)
    with torch.no_grad():
        theirs = pair.theirs.transformer(
            hidden_states=torch.from_numpy(arrays["latents"]),
            encoder_hidden_states=torch.from_numpy(arrays["text"]),
            timestep=torch.from_numpy(arrays["timestep"]) / 1000,
            img_ids=pair.theirs._prepare_latent_ids(shape),
            txt_ids=pair.theirs._prepare_text_ids(torch.zeros(batch, text_len, 1)),
            return_dict=False,
        )[0].numpy()
    assert relative(ours, theirs) < TOLERANCE
    # Blocks one by one, and with modules' outputs that are known.
    start = go(config.embed(given))
    last = go(config.run_blocks(start, 0, config.num_blocks))
    assert relative(to_numpy(go(config.output(last))), ours) < 1e-5
    for level in ("attention", "modules"):
        _, values = go(config.run_and_take(given, level))
        found = go(config.run_given(given, level, values))
        assert relative(to_numpy(found), ours) < 1e-5


@pytest.mark.parametrize("steps", [1, 4, 10, 50, 200])
@pytest.mark.parametrize("tokens", [1, 256, 4096, 4300, 4301, 9216])
def test_the_shift_is_diffusers(pair: Pair, tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    assert empirical_mu(tokens, steps) == compute_empirical_mu(tokens, steps)
    scheduler = pair.theirs.scheduler
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps).tolist(),
        mu=compute_empirical_mu(tokens, steps),
    )
    ours = pair.ours.sampler.schedule(steps, image_seq_len=tokens)
    assert np.array_equal(ours.sigmas, scheduler.sigmas.numpy())


# Whole pictures.


@pytest.mark.parametrize("size", [(16, 32), (28, 20), (12, 84)])
@pytest.mark.parametrize(
    "settings",
    [
        {"true_cfg_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"true_cfg_scale": 2.5, "max_sequence_length": 77},
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
    assert psnr(ours.images, theirs) >= 60


@pytest.mark.parametrize(
    "sizes", [[(64, 80)], [(97, 133), (64, 68)], [(64, 64), (65, 190), (91, 79)]]
)
def test_references_equal_diffusers(pair: Pair, sizes: list[tuple[int, int]]) -> None:
    """One and several, of sizes that are no whole tokens."""
    images = [scene(*size, seed) for seed, size in enumerate(sizes)]
    settings: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 3}
    ours = pair.ours.generate(PROMPTS[0], image=images, seed=5, **settings)
    theirs = pair.draw(PROMPTS[0], 5, images, **settings)
    assert psnr(ours.images, theirs) >= 60
    read = sum((height // 4) * (width // 4) for height, width in sizes)
    assert ours.report.reference_tokens == read
    plain = pair.ours.generate(PROMPTS[0], seed=5, **settings)
    assert psnr(plain.images, theirs) < 50  # they were seen
    if len(images) > 1:
        turned = pair.ours.generate(PROMPTS[0], image=images[::-1], seed=5, **settings)
        assert psnr(turned.images, theirs) < 55  # each at its own place


def test_prompts_share_references(pair: Pair) -> None:
    images = [scene(72, 64, 1), scene(64, 64, 2)]
    settings: dict[str, Any] = {
        "height": 20,
        "width": 16,
        "num_inference_steps": 3,
        "num_images_per_prompt": 2,
    }
    ours = pair.ours.generate(PROMPTS, image=images, seed=5, **settings)
    assert psnr(ours.images, pair.draw(PROMPTS, 5, images, **settings)) >= 60


@pytest.mark.parametrize("size", [(1100, 1000), (700, 1800), (1024, 1024), (41, 67)])
def test_a_reference_is_scaled_as_diffusers_scales_it(
    pair: Pair, size: tuple[int, int]
) -> None:
    image, processor = scene(*size), pair.theirs.image_processor
    scaled = image
    if size[0] * size[1] > 1024 * 1024:
        scaled = processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (side // 4 * 4 for side in scaled.size)
    wanted = processor.preprocess(
        scaled, height=height, width=width, resize_mode="crop"
    )
    request = GenerationRequest(
        ("a",), seed=1, inputs=PictureInputs((Picture(np.asarray(image)),))
    )
    context = pair.ours.create_context(request)
    assert context.given is not None
    [reference] = context.given.references
    assert np.array_equal(reference.pixels, wanted.numpy().transpose(0, 2, 3, 1))
    # What is drawn has that size, too, unless the request says otherwise.
    assert (context.height, context.width) == (height, width)


def test_each_text_is_encoded_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = pair.ours.loaded["text_encoder"]
    assert isinstance(encoder, CausalLMTextEncoder)
    encode, counts = encoder.encode, []

    def counted(ids: np.ndarray, lengths: np.ndarray | None = None) -> Buffer:
        counts.append(len(ids))
        return encode(ids, lengths)

    monkeypatch.setattr(encoder, "encode", counted)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    settings: dict[str, Any] = {"height": 8, "width": 8, "num_inference_steps": 1}
    several = {"num_images_per_prompt": 2, **settings}
    ours = pair.ours.generate(prompts, seed=3, **several)
    assert counts == [2, 1]
    assert psnr(ours.images, pair.draw(prompts, 3, **several)) >= 60
    pair.ours.generate(PROMPTS[0], seed=3, negative_prompt=PROMPTS[1], **settings)
    assert counts == [2, 1, 1, 1]


def test_a_long_prompt_is_cut_as_in_diffusers_and_that_is_said(pair: Pair) -> None:
    prompt = "a red circle " * 5000 + "and a heart"
    settings: dict[str, Any] = {"height": 12, "width": 12, "num_inference_steps": 2}
    limits: list[dict[str, Any]] = [{}, {"max_sequence_length": 45}]
    for limit in limits:
        ours = pair.ours.generate(prompt, seed=1, **settings, **limit)
        theirs = pair.draw(prompt, 1, **settings, **limit)
        assert psnr(ours.images, theirs) >= 60
        length = limit.get("max_sequence_length", 512)
        (note,) = ours.report.warnings
        assert f"prompt 1 is longer than {length} tokens and was cut" in note
        assert ours.report.options == {"max_sequence_length": length}


def test_defaults_are_the_models(pair: Pair, distilled: Pair) -> None:
    request = GenerationRequest(("a heart",), seed=1, height=12, width=12)
    context = pair.ours.create_context(request)
    assert (context.num_inference_steps, context.true_cfg_scale) == (50, 4.0)
    assert context.negative_tokens is not None
    context = distilled.ours.create_context(request)
    assert (context.num_inference_steps, context.true_cfg_scale) == (4, 1.0)
    assert context.negative_tokens is None
    assert context.defaults["true_cfg_scale"] == "model_index.json: distilled"
    assert pair.ours.default_size == (1024, 1024)


def test_a_distilled_model_draws_without_guidance(distilled: Pair) -> None:
    size: dict[str, Any] = {"height": 16, "width": 24}
    ours = distilled.ours.generate(PROMPTS[0], seed=2, **size)
    theirs = distilled.draw(PROMPTS[0], 2, num_inference_steps=4, **size)
    assert psnr(ours.images, theirs) >= 60


@pytest.mark.parametrize(
    "cache",
    [FirstBlockConfig(2.0), PabConfig(), TaylorSeerConfig(2, 2, target="modules")],
    ids=["first-block", "pab", "modules"],
)
def test_requests_draw_the_same_in_an_engine(
    pair: Pair, cache: AbstractCacheConfig
) -> None:
    """Of different prompts, two with the same references and one without."""
    images = [scene(16, 12, seed) for seed in (1, 2)]
    inputs = PictureInputs(tuple(Picture(np.asarray(image)) for image in images))
    settings: dict[str, Any] = {"height": 12, "width": 20, "num_inference_steps": 8}
    given = {PROMPTS[0]: inputs, PROMPTS[1]: inputs, "a heart": None}
    requests = [
        GenerationRequest((prompt,), seed=3, cache=cache, inputs=own, **settings)
        for prompt, own in given.items()
    ]
    with Engine(pair.ours) as engine:
        handles = [engine.submit(request) for request in requests]
        together = [handle.result() for handle in handles]
    for request, result in zip(requests, together, strict=True):
        alone = pair.ours.generate(
            request.prompts[0],
            seed=3,
            cache=cache,
            image=images if request.inputs is inputs else None,
            **settings,
        )
        assert alone.report.full_passes < alone.report.total_passes
        assert result.report.full_passes == alone.report.full_passes
        assert psnr(result.images, alone.images) >= 60


# Adapters.


# diffusers' modules, by Black Forest Labs' names where they have others.
ADAPTED = {
    "x_embedder": "img_in",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.1.attn.to_add_out": "double_blocks.1.txt_attn.proj",
    "transformer_blocks.0.ff.linear_in": "double_blocks.0.img_mlp.0",
    "transformer_blocks.1.ff_context.linear_in": "double_blocks.1.txt_mlp.0",
    "transformer_blocks.1.ff.linear_out": "double_blocks.1.img_mlp.2",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": "single_blocks.0.linear1",
    "single_transformer_blocks.2.attn.to_out": "single_blocks.2.linear2",
}
QKV = {
    "double_blocks.0.img_attn.qkv": [
        f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")
    ],
    "double_blocks.1.txt_attn.qkv": [
        f"transformer_blocks.1.attn.add_{name}_proj" for name in "qkv"
    ],
}


def lora_pairs(theirs: Flux2KleinPipeline) -> dict[str, tuple[torch.Tensor, ...]]:
    """Two random matrices of rank 2 for each module that is adapted."""
    generator = torch.Generator().manual_seed(4)
    modules = dict(theirs.transformer.named_modules())
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for name in [*ADAPTED, *(part for parts in QKV.values() for part in parts)]:
        rows, columns = modules[name].weight.shape
        found[name] = (
            torch.randn(2, columns, generator=generator) / columns**0.5,
            torch.randn(rows, 2, generator=generator) / 2,
        )
    return found


@pytest.mark.parametrize("naming", ["peft", "comfy", "kohya"])
def test_adapters_equal_diffusers(
    pair: Pair, flux2_folder: Path, tmp_path: Path, naming: str
) -> None:
    pairs = lora_pairs(pair.theirs)
    plain = {
        f"transformer.{name}.{half}.weight": matrix.contiguous()
        for name, both in pairs.items()
        for half, matrix in zip(("lora_A", "lora_B"), both, strict=True)
    }
    written = plain
    if naming != "peft":
        renamed = {ADAPTED[name]: pairs[name] for name in ADAPTED}
        # The shift before the scale.
        down, up = pairs["norm_out.linear"]
        renamed[ADAPTED["norm_out.linear"]] = down, torch.cat(up.chunk(2)[::-1])
        for stem, parts in QKV.items():
            downs, ups = zip(*(pairs[part] for part in parts), strict=True)
            # Fused, one matrix of all their ranks, as far as each row has its own.
            renamed[stem] = torch.cat(downs), torch.block_diag(*ups)
        halves = {"comfy": ("lora_A", "lora_B"), "kohya": ("lora_down", "lora_up")}
        written = {}
        for name, both in renamed.items():
            stem = f"diffusion_model.{name}"
            if naming == "kohya":
                stem = f"lora_unet_{name.replace('.', '_')}"
                written[f"{stem}.alpha"] = torch.tensor(float(both[0].shape[0]))
            for half, matrix in zip(halves[naming], both, strict=True):
                written[f"{stem}.{half}.weight"] = matrix.contiguous()
    file = tmp_path / f"{naming}.safetensors"
    save_file(written, file)
    ours = load_pipeline(
        flux2_folder, device="cpu", precompiled=[TEST_GRAPHS / "flux2"], loras=[file]
    )
    settings: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 3}
    picture = ours.generate(PROMPTS[0], seed=6, **settings).images
    pair.theirs.load_lora_weights(dict(plain), adapter_name="style")
    try:
        theirs = pair.draw(PROMPTS[0], 6, **settings)
    finally:
        pair.theirs.unload_lora_weights()
    assert psnr(picture, theirs) >= 55
    assert psnr(picture, pair.draw(PROMPTS[0], 6, **settings)) < 40


def test_an_adapter_of_another_model_is_refused(
    flux2_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.safetensors"
    name = "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    down, up = torch.zeros(2, 48), torch.zeros(380, 2)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, file)
    # Three of the width, and two of two and a half times as many.
    with pytest.raises(ModelLoadError, match=r"changes \(380, 48\), here \(384, 48\)"):
        load_pipeline(
            flux2_folder,
            device="cpu",
            precompiled=[TEST_GRAPHS / "flux2"],
            loras=[file],
        )


# What is refused.


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("transformer", {"guidance_embeds": True}, "guidance_embeds must be False"),
        ("transformer", {"patch_size": 2}, "patch_size must be 1"),
        ("transformer", {"axes_dims_rope": [4, 4, 8]}, "must be four even sizes"),
        ("transformer", {"axes_dims_rope": [4, 4, 4, 8]}, "must be four even sizes"),
        ("transformer", {"axes_dims_rope": [3, 5, 4, 4]}, "must be four even sizes"),
        ("transformer", {"rope_theta": 0}, "rope_theta must be above 1, got 0"),
        ("transformer", {"out_channels": 8}, "out_channels must be in_channels = 12"),
        ("transformer", {"joint_attention_dim": 48}, "are they of one model"),
        ("transformer", {"in_channels": 16}, "must take 4 \\* 3"),
        ("text_encoder", {"model_type": "llama"}, "model_type must be"),
        ("text_encoder", {"num_hidden_layers": 26}, "must have 27 layers or more"),
        ("vae", {"batch_norm_eps": None}, "no batch_norm_eps"),
        ("vae", {"batch_norm_eps": -1.0}, "batch_norm_eps must be in"),
        ("vae", {"patch_size": [1, 1]}, "patch_size must be"),
        ("vae", {"decoder_block_out_channels": [8]}, "must be as many as"),
    ],
)
def test_configurations_of_other_models_are_refused(
    flux2_folder: Path,
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = copy_folder(flux2_folder, tmp_path / "copy")
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelLoadError, match=message):
        open_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"is_distilled": "true"}, "is_distilled must be true or"),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, "padding_side"),
        (
            "tokenizer/tokenizer_config.json",
            {"truncation_side": "left"},
            "truncation_s",
        ),
        ("tokenizer/tokenizer_config.json", {"pad_token": "<none>"}, "its 453 ids are"),
    ],
)
def test_what_would_draw_otherwise_is_refused(
    flux2_folder: Path,
    tmp_path: Path,
    file: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = copy_folder(flux2_folder, tmp_path / "copy")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelLoadError, match=message):
        load_pipeline(folder, device="cpu", precompiled=[TEST_GRAPHS / "flux2"])


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_diffusers_word_for_guidance_is_not_passed_over(
    pair: Pair, distilled: Pair, scale: float
) -> None:
    request = GenerationRequest(("a",), seed=1, height=4, width=4, guidance_scale=scale)
    (said,) = pair.ours.create_context(request).warnings
    assert said.endswith("leave it out: true_cfg_scale is what guides here, 4 now")
    # Nothing is guided, and up to 1 nothing was asked for.
    warnings = distilled.ours.create_context(request).warnings
    assert bool(warnings) is (scale > 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 22}, "height must be a multiple of 4 pixels, got 22"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"image": [scene(8, 8)] * 11}, "at most 10"),
        (
            {"image": scene(3, 40), "height": 8, "width": 8},
            "less than the 4 pixels a side",
        ),
        ({"image": scene(8, 8), "strength": 0.5}, "strength"),
    ],
)
def test_bad_requests_are_refused(
    pair: Pair, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        pair.ours.generate("a heart", seed=1, **settings)


def test_graphs_build_for_a_gpu(flux2_folder: Path) -> None:
    script = cross_compile.__file__
    done = processes.run(sys.executable, script, flux2_folder, "build")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
