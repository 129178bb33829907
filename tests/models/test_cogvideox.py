"""CogVideoX against diffusers, from its parts to whole videos, and its caches."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cogvideox_folder import (
    TEXT_LENGTH,
    VARIANTS,
    make_cogvideox_folder,
)
from diffusers import CogVideoXPipeline as TheirPipeline
from diffusers import FasterCacheConfig as TheirFasterCache
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipelineOutput
from folders import TEST_GRAPHS
from max.driver import Buffer
from pictures import psnr
from PIL import Image, ImageSequence

from graphs.autoencoder_kl_cogvideox import chunk_lengths
from graphs.cogvideox_positions import position_table, rotary_table
from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    FasterCacheConfig,
    GenerationRequest,
    ModelLoadError,
    PabConfig,
    RequestError,
    TextToImagePipeline,
    load_pipeline,
    open_model,
)
from max_diffusion.cli.main import main
from max_diffusion.engine import Engine, SubmitOptions
from max_diffusion.media.writers import encoded_video
from max_diffusion.models.cogvideox.decoder import CogVideoXDecoder

PROMPTS = ["a red circle", "two green stars on a gray background, not a heart"]
Open = Callable[[str], Any]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("cogvideox")
    return {name: make_cogvideox_folder(root / name, name) for name in VARIANTS}


@pytest.fixture(scope="session")
def ours(folders: Mapping[str, Path]) -> Open:
    """Opens a variant once; caches are 5b's alone."""
    opened: dict[str, TextToImagePipeline] = {}

    def get(name: str) -> TextToImagePipeline:
        if name not in opened:
            opened[name] = load_pipeline(
                folders[name],
                device="cpu",
                caches=tuple(CACHES) if name == "5b" else ("none",),
                precompiled=[TEST_GRAPHS / "cogvideox"],
            )
        return opened[name]

    return get


@pytest.fixture(scope="session")
def theirs(folders: Mapping[str, Path]) -> Open:
    opened: dict[str, TheirPipeline] = {}

    def get(name: str) -> TheirPipeline:
        if name not in opened:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the oracle's own
                found = TheirPipeline.from_pretrained(
                    folders[name], torch_dtype=torch.float32
                )
            found.set_progress_bar_config(disable=True)
            opened[name] = found
        return opened[name]

    return get


def their_video(pipeline: TheirPipeline, **settings: Any) -> np.ndarray:
    """uint8 ``(B, F, H, W, 3)``; a list of seeds is a list of generators."""
    seed = settings.pop("seed")
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator("cpu").manual_seed(each) for each in seeds]
    with torch.no_grad():
        found = pipeline(
            **settings,
            generator=generators if isinstance(seed, list) else generators[0],
            max_sequence_length=TEXT_LENGTH,
            output_type="np",
        )
    assert isinstance(found, CogVideoXPipelineOutput)
    return (np.asarray(found.frames) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("frames", "rows", "columns"), [(4, 3, 4), (2, 2, 3), (2, 3, 1)]
)
def test_the_transformer_is_diffusers(
    ours: Open, theirs: Open, variant: str, frames: int, rows: int, columns: int
) -> None:
    pipeline, reference = ours(variant), theirs(variant).transformer
    config = pipeline.loaded["transformer"].denoiser().config
    deep = config.frames_a_token
    rng = np.random.default_rng(frames * rows)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    latents, text = (
        normal(2, frames, 4, 2 * rows, 2 * columns),
        normal(2, TEXT_LENGTH, 40),
    )
    timestep = np.array([999.0, 379.0], np.float32)
    grid = frames // deep, rows, columns
    is_rotary = config.use_rotary_positional_embeddings
    table = (rotary_table if is_rotary else position_table)(config, *grid)
    rotary = tuple(torch.from_numpy(part.copy()) for part in table)
    with torch.no_grad():
        wanted = reference(
            hidden_states=torch.from_numpy(latents),
            encoder_hidden_states=torch.from_numpy(text),
            timestep=torch.from_numpy(timestep).long(),
            image_rotary_emb=rotary if is_rotary else None,
            return_dict=False,
        )[0].numpy()
    inputs = {
        "latents": pipeline._packed(latents),
        "timestep": timestep,
        "text": text,
        "rotary" if is_rotary else "positions": table,
    }
    names = pipeline.loaded["transformer"].inputs.names
    graph = pipeline.models["transformer.full"]
    buffers = [Buffer.from_numpy(np.ascontiguousarray(inputs[name])) for name in names]
    found = graph.execute(*buffers)[0].to_numpy()
    assert_near(found, pipeline._packed(wanted))


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert error < 1e-4


@pytest.mark.parametrize("variant", ["2b", "1.5"])
@pytest.mark.parametrize(
    ("frames", "rows", "columns"),
    [(1, 3, 5), (2, 4, 3), (3, 1, 2), (4, 3, 5), (7, 2, 3)],
)
def test_the_decoder_is_diffusers(
    ours: Open, theirs: Open, variant: str, frames: int, rows: int, columns: int
) -> None:
    pipeline, reference = ours(variant), theirs(variant).vae
    decoder = pipeline.loaded["vae"]
    assert isinstance(decoder, CogVideoXDecoder)
    rng = np.random.default_rng(frames)
    latents = rng.standard_normal((frames, rows, columns, 4)).astype(np.float32)
    scaled = torch.from_numpy(latents / np.float32(0.7))
    last: list[np.ndarray] = []
    probe = reference.decoder.conv_out.register_forward_pre_hook(
        lambda _, values: last.append(values[0].numpy().copy())
    )
    with torch.no_grad():
        wanted = reference.decode(scaled.permute(3, 0, 1, 2)[None]).sample[0]
    probe.remove()
    pixels = ((wanted.permute(1, 2, 3, 0).numpy() / 2 + 0.5).clip(0, 1)) * 255
    found = np.concatenate(list(decoder.decode(latents)))
    assert found.shape == pixels.shape
    assert np.abs(found - pixels).max() <= 0.5 + 1e-2
    # What the last convolution reads, before anything is rounded.
    *_, outputs = decoder.chunks(latents)
    kept = outputs[-1].to_numpy()
    expected = last[-1][0].transpose(1, 2, 3, 0)
    expected = np.concatenate([expected[:1], expected])[-2:]
    assert_near(kept, expected)


def test_chunks_are_those_of_the_reference() -> None:
    plans = {1: (1,), 2: (2,), 3: (3,), 4: (2, 2), 5: (3, 2), 12: (2,) * 6}
    assert {frames: tuple(chunk_lengths(frames)) for frames in plans} == plans
    assert chunk_lengths(13) == (3, 2, 2, 2, 2, 2)


VIDEOS: dict[str, tuple[str, dict[str, Any]]] = {
    "2b": ("2b", {"num_frames": 9}),
    "2b-17": ("2b", {"num_frames": 17, "num_inference_steps": 4}),
    "2b-size": ("2b", {"height": 16, "width": 40, "guidance_scale": 1.0}),
    "2b-1-frame": ("2b", {"num_frames": 1}),
    "5b": ("5b", {"num_frames": 9, "num_inference_steps": 4}),
    "5b-17": ("5b", {"num_frames": 17, "use_dynamic_cfg": True}),
    "5b-size": ("5b", {"height": 16, "width": 40, "negative_prompt": "a heart"}),
    "1.5": ("1.5", {"num_frames": 9, "num_inference_steps": 4}),
    "1.5-17": ("1.5", {"num_frames": 17, "height": 16, "width": 24}),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_diffusers(ours: Open, theirs: Open, name: str) -> None:
    variant, changed = VIDEOS[name]
    settings = {"num_inference_steps": 3, "guidance_scale": 6.0, "seed": 7} | changed
    wanted = their_video(theirs(variant), prompt=PROMPTS, **settings)
    settings["true_cfg_scale"] = settings.pop("guidance_scale")
    found = ours(variant).generate(PROMPTS, **settings)
    assert found.frames.shape == wanted.shape
    assert len(np.unique(wanted)) > 50
    for mine, other in zip(found.frames, wanted, strict=True):
        assert psnr(mine, other) >= 55


def test_defaults_are_the_models(ours: Open, theirs: Open) -> None:
    result = ours("5b").generate(PROMPTS[0], seed=7, num_inference_steps=2)
    wanted = their_video(
        theirs("5b"), prompt=PROMPTS[:1], seed=7, num_inference_steps=2
    )
    assert psnr(result.frames, wanted) >= 55
    assert result.fps == 8.0
    assert result.report.true_cfg_scale == 6.0
    options = {"num_frames": 9, "fps": 8.0, "use_dynamic_cfg": False}
    assert result.report.options == options
    assert ours("1.5").frames_of(ours("1.5").options_class()).fps == 16.0


def test_a_video_with_a_seed_of_its_own_is_the_same_alone(
    ours: Open, theirs: Open
) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 3}
    both = ours("5b").generate(PROMPTS, seed=[3, 4], **settings)
    wanted = their_video(theirs("5b"), prompt=PROMPTS, seed=[3, 4], **settings)
    for index, (prompt, seed) in enumerate(zip(PROMPTS, (3, 4), strict=True)):
        alone = ours("5b").generate(prompt, seed=seed, **settings).frames[0]
        assert np.array_equal(alone, both.frames[index])
        assert psnr(alone, wanted[index]) >= 55
    # A context may be run again: its noise begins anew.
    request = GenerationRequest((PROMPTS[0],), seed=3, num_inference_steps=3)
    context = ours("5b").create_context(request)
    for _ in range(2):
        output = ours("5b").execute(ours("5b").prepare_inputs(context))
        assert np.array_equal(output.frames[0], both.frames[0])


def test_the_engine_draws_the_same_videos(ours: Open) -> None:
    requests = [
        GenerationRequest(
            (PROMPTS[n % 2],),
            seed=n,
            num_inference_steps=2 + n % 2,
            options={"num_frames": 1 + 8 * (n % 2)},
        )
        for n in range(3)
    ]
    with Engine(ours("5b")) as engine:
        handles = [engine.submit(each, SubmitOptions()) for each in requests]
        for handle, request in zip(handles, requests, strict=True):
            alone = ours("5b").draw(request).frames
            assert np.array_equal(handle.result(120).frames, alone)


def their_steps(
    pipeline: TheirPipeline, config: Any, settings: Mapping[str, Any]
) -> tuple[np.ndarray, list[int]]:
    """Their video, and how many halves of the batch attended at every step."""
    transformer, found = pipeline.transformer, [0] * settings["num_inference_steps"]

    def note(_: object, values: tuple[torch.Tensor, ...], __: object) -> None:
        timesteps = pipeline.scheduler.timesteps.tolist()
        found[timesteps.index(int(pipeline.current_timestep))] = len(values[0])

    probe = transformer.transformer_blocks[1].attn1.to_q.register_forward_hook(note)
    transformer.enable_cache(config)
    try:
        return their_video(pipeline, **settings), found
    finally:
        transformer.disable_cache()
        probe.remove()


@pytest.mark.filterwarnings("ignore")
def test_the_guides_pyramid_is_diffusers(ours: Open, theirs: Open) -> None:
    """The caching guide's example: every second attention from 800 down to 100."""
    pipeline = theirs("5b")
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: pipeline.current_timestep,
    )
    settings = {"prompt": PROMPTS[:1], "seed": 3, "num_inference_steps": 12}
    wanted, halves = their_steps(pipeline, config, settings)
    found = drawn(ours, PabConfig(interval=2, min_timestep=100, max_timestep=800))
    assert actions(found) == [
        ["compute"] * 2 if half else ["partial"] * 2 for half in halves
    ]
    assert [step for step, half in enumerate(halves) if half] == [
        0,
        1,
        2,
        4,
        6,
        8,
        10,
        11,
    ]
    assert psnr(found.frames, wanted) >= 40


@pytest.mark.filterwarnings("ignore")
def test_the_guides_fastercache_is_diffusers(ours: Open, theirs: Open) -> None:
    """The caching guide's example, on the guide's ranges of timesteps."""
    pipeline = theirs("5b")
    config = TheirFasterCache(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        current_timestep_callback=lambda: pipeline.current_timestep,
        attention_weight_callback=lambda _: 0.3,
        unconditional_batch_skip_range=5,
        unconditional_batch_timestep_skip_range=(-1, 781),
        tensor_format="BFCHW",
        # Ours weights a difference once, theirs again at each estimate.
        alpha_low_frequency=1.0,
        alpha_high_frequency=1.0,
    )
    settings = {"prompt": PROMPTS[:1], "seed": 3, "num_inference_steps": 12}
    wanted, halves = their_steps(pipeline, config, settings)
    found = drawn(
        ours,
        FasterCacheConfig(
            attention_interval=2,
            attention_weight=0.3,
            guidance_interval=5,
            guidance_max_timestep=781,
            alpha_low=1.0,
            alpha_high=1.0,
        ),
    )
    expected = {
        2: ["compute", "compute"],
        1: ["compute", "estimate"],
        0: ["partial", "estimate"],
    }
    assert actions(found) == [expected[half] for half in halves]
    assert psnr(found.frames, wanted) >= 40


def drawn(ours: Open, cache: AbstractCacheConfig) -> Any:
    return ours("5b").generate(PROMPTS[0], seed=3, num_inference_steps=12, cache=cache)


def actions(result: Any) -> list[list[str]]:
    """What the conditional and the unconditional branch did at every step."""
    found: list[list[str]] = [[] for _ in range(12)]
    for record in result.report.steps:
        found[record.step] += record.actions
    return found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_frames": 5}, "one more than a multiple of 8, got 5; nearest: 1 or 9"),
        ({"num_frames": 16}, "one more than a multiple of 8, got 16; nearest: 9 or 17"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"height": 20}, "height must be a multiple of 8 pixels, got 20; nearest"),
        ({"sigmas": [1.0, 0.5]}, "sigmas have no effect on this model"),
        ({"num_inference_steps": 1001}, "must be at most 1000, the timesteps"),
        (
            {"max_sequence_length": 9},
            "is no option of CogVideoXPipeline; it has num_fr",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said_before(
    folders: Mapping[str, Path], asked: dict[str, Any], message: str
) -> None:
    pipeline = open_model(folders["5b"], device="cpu")
    settings = {
        name: asked.pop(name)
        for name in ("height", "sigmas", "num_inference_steps")
        if name in asked
    }
    with pytest.raises(RequestError, match=message):
        pipeline.create_context(GenerationRequest(("x",), options=asked, **settings))


def test_positions_of_1_5_end_with_the_trained_size(
    folders: Mapping[str, Path],
) -> None:
    pipeline = open_model(folders["1.5"], device="cpu")
    request = GenerationRequest(("x",), height=32, width=24)
    with pytest.raises(RequestError, match="height must be at most 24 pixels, where"):
        pipeline.create_context(request)


def test_longer_texts_are_cut_with_a_word(folders: Mapping[str, Path]) -> None:
    pipeline = open_model(folders["2b"], device="cpu")
    request = GenerationRequest((" ".join(["red"] * 10_000),), options={"fps": 12})
    context = pipeline.create_context(request)
    assert context.fps == 12.0
    assert context.tokens["text_encoder"].shape == (1, TEXT_LENGTH)
    (note,) = context.warnings
    assert note.startswith("prompt 1 is longer than the 12 tokens of text_encoder and")


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        (
            "text_encoder",
            {"d_model": 48},
            "takes 40 channels of text, but the text_enc",
        ),
        ("transformer", {"in_channels": 8}, "in_channels 8 and out_channels 4 must be"),
        (
            "transformer",
            {"ofs_embed_dim": 12},
            "ofs_embed_dim is 12, as of models that",
        ),
        ("transformer", {"activation_fn": "gelu"}, "activation_fn must be 'gelu-appr"),
        ("vae", {"latent_channels": 5}, "takes 4 latent channels, but the vae gives 5"),
        (
            "vae",
            {"use_post_quant_conv": True},
            "use_post_quant_conv must be false, got",
        ),
        ("vae", {"temporal_compression_ratio": 3}, "must be a power of 2 from 2 to 4"),
        (
            "",
            {"_class_name": "CogVideoXImageToVideoPipeline"},
            "names 'CogVideoXImageToVideoPipeline'; supported are FluxPipeline,",
        ),
        ("scheduler", {"prediction_type": "epsilon"}, "prediction_type must be v_pred"),
    ],
)
def test_folders_of_other_models_are_refused(
    folders: Mapping[str, Path],
    tmp_path: Path,
    part: str,
    changed: dict[str, Any],
    message: str,
) -> None:
    folder = tmp_path / "x"
    for source in folders["2b"].rglob("*"):
        if source.is_file():
            target = folder / source.relative_to(folders["2b"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    name = {"": "model_index.json", "scheduler": "scheduler_config.json"}.get(
        part, "config.json"
    )
    file = folder / part / name
    settings = json.loads(file.read_text()) | changed
    file.unlink()
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelLoadError, match=message):
        open_model(folder, device="cpu")


@pytest.mark.parametrize("suffix", ["mp4", "gif", "webp"])
def test_the_command_line_writes_videos(
    ours: Open, folders: Mapping[str, Path], tmp_path: Path, suffix: str
) -> None:
    path, again = tmp_path / f"x.{suffix}", tmp_path / "again.webp"
    words = ["generate", PROMPTS[0], "--model", str(folders["2b"]), "--seed", "3"]
    options = ["--steps", "2", "--num-frames", "9", "--output", str(path)]
    like = ["generate", "--like", str(path), "--output", str(again)]
    graphs = ["--precompiled", str(TEST_GRAPHS / "cogvideox")]
    for arguments in ([*words, *options], like):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *graphs])
        assert ended.value.code == 0
    drawn = ours("2b").generate(PROMPTS[0], seed=3, num_inference_steps=2)
    # A WebP is not quite what was drawn, but the same for the same frames.
    wanted = shown_by(io.BytesIO(encoded_video(drawn.frames[0], "webp", 8.0, {})))
    assert np.array_equal(shown_by(again), wanted)
    assert wanted.shape == drawn.frames[0].shape


def shown_by(file: Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        frames = ImageSequence.Iterator(image)
        return np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
