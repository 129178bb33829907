"""Trains the demo model that ships with max_diffusion, from nothing but this script.

Five stages, each written to ``--work`` when done and skipped when already there, so an
interrupted run continues where it stopped: tokenizers, autoencoder, latents, flow
matching (transformer and both text encoders together), guidance distillation. The
result is one diffusers-layout folder that diffusers' ``FluxPipeline`` loads too.

    .venv/bin/python scripts/train_demo.py --output max_diffusion/demo_model
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_tokenizers import TEXT_LENGTH, build_clip_tokenizer, build_t5_tokenizer
from demo_trainer import Trainer, attention, log, progress, save
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from max_diffusion.demo.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    caption,
    draw,
    patch_labels,
    training_scene,
)

LATENT_CHANNELS = 8
PACKED_CHANNELS = 4 * LATENT_CHANNELS
LATENT_SIZE = 16
CAPTION_DROPOUT = 0.1
# Base training conditions on scale 1; distillation then teaches the range.
GUIDANCE_RANGE = (1.0, 5.0)


def main() -> None:
    """Runs every stage that is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, default=Path("demo_work"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--autoencoder-steps", type=int, default=5000)
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--flow-steps", type=int, default=21_000)
    parser.add_argument("--distill-steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if device.type == "cpu":
        transformer_flux.dispatch_attention_fn = batched_attention
    vae = train_autoencoder(args.work, device, args.autoencoder_steps)
    scenes, latents, statistics = encode_scenes(args.work, device, vae, args.scenes)
    model = DemoModel(args.work).to(device)
    train_flow(args.work, model, scenes, latents, args.flow_steps)
    distill_guidance(args.work, model, scenes, latents, args.distill_steps)
    export(args.output, vae, model, statistics)


class DemoModel(nn.Module):
    """The FLUX transformer with its two text encoders, trained as one.

    ``forward`` takes packed latents ``(B, S_img, C)``, sigma ``(B,)``, guidance
    ``(B,)`` and captions, and predicts the velocity ``noise - data``.
    """

    image_ids: Tensor  # buffers, which torch would type as Tensor or Module
    text_ids: Tensor

    def __init__(self, work: Path) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        captions = [spoken(rng, training_scene(rng)) for _ in range(20_000)]
        self.clip_tokenizer = build_clip_tokenizer(captions)
        self.t5_tokenizer = build_t5_tokenizer(captions)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=PACKED_CHANNELS,
            num_layers=2,
            num_single_layers=6,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=128,
            pooled_projection_dim=96,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=128,
                d_kv=32,
                num_heads=4,
                d_ff=320,
                num_layers=3,
                num_decoder_layers=0,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.clip_tokenizer),
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=3,
                max_position_embeddings=TEXT_LENGTH,
                hidden_act="quick_gelu",
                projection_dim=96,
                bos_token_id=self.clip_tokenizer.bos_token_id,
                eos_token_id=self.clip_tokenizer.eos_token_id,
                pad_token_id=self.clip_tokenizer.pad_token_id,
            )
        )
        # Only trained with, see train_flow: what each patch will show, and what the
        # object is that each word speaks of.
        self.patch_head = nn.Sequential(
            nn.LayerNorm(192),
            nn.Linear(192, 192),
            nn.SiLU(),
            nn.Linear(192, len(SHAPES) + 1 + len(COLOURS) + 1 + 2),
        )
        self.word_head = nn.Linear(128, len(SHAPES) + len(COLOURS) + 2)
        # Each block starts as the identity and the prediction as zero, as in DiT.
        for name, module in self.transformer.named_modules():
            if name.endswith(
                ("norm1.linear", "norm1_context.linear", "norm.linear")
            ) or (name in ("proj_out", "norm_out.linear")):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        # The transformer takes its timestep in the latents' dtype, and bfloat16 would
        # round it to multiples of 4: latents come in float32 and are cast here.
        self.transformer.x_embedder.register_forward_pre_hook(
            lambda module, inputs: (inputs[0].to(module.weight.dtype),)
        )
        grid = torch.arange(LATENT_SIZE // 2).float()
        image_ids = torch.zeros(LATENT_SIZE // 2, LATENT_SIZE // 2, 3)
        image_ids[..., 1] = grid[:, None]
        image_ids[..., 2] = grid[None, :]
        self.register_buffer("image_ids", image_ids.reshape(-1, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(TEXT_LENGTH, 3), persistent=False)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text states ``(B, S_txt, D)`` and the pooled vector ``(B, D_pool)``."""
        options = {
            "padding": "max_length",
            "max_length": TEXT_LENGTH,
            "truncation": True,
            "return_tensors": "pt",
        }
        device = self.image_ids.device
        t5_ids = self.t5_tokenizer(captions, **options).input_ids.to(device)
        clip_ids = self.clip_tokenizer(captions, **options).input_ids.to(device)
        # No attention mask: FluxPipeline gives none, padding is part of the input.
        text = self.t5(t5_ids, attention_mask=torch.ones_like(t5_ids)).last_hidden_state
        return text, self.clip(clip_ids).pooler_output

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        guidance: Tensor,
        text: Tensor,
        pooled: Tensor,
    ) -> Tensor:
        """Predicts the velocity, shape of ``latents``."""
        return self.transformer(
            hidden_states=latents,
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


def batched_attention(
    query: Tensor, key: Tensor, value: Tensor, **_options: object
) -> Tensor:
    """Attention of ``(B, S, H, D)``, as diffusers dispatches it."""
    return attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def spoken(rng: np.random.Generator, scene: Scene) -> str:
    """A fresh caption, now and then written as a sentence."""
    text = caption(rng, scene)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def train_autoencoder(work: Path, device: torch.device, steps: int) -> AutoencoderKL:
    """Trains the AutoencoderKL on freshly drawn scenes (L1, edges, KL)."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(device, memory_format=torch.channels_last)
    trainer = Trainer(work, "autoencoder", vae, steps, peak=4e-3, dtype=torch.float32)
    for step in trainer.steps():
        rng = np.random.default_rng((2, step))
        # Quarter pictures first, four times cheaper; whole ones for the last sixth.
        pictures = np.stack([draw(training_scene(rng)) for _ in range(8)])
        if step < steps * 5 // 6:
            top, left = rng.integers(0, 9, size=2) * 8
            pictures = pictures[:, top : top + 64, left : left + 64]
        x = to_tensor(pictures).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = y - x
        # Edges are few pixels but most of what is seen: weigh their gradients too.
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + 0.5 * edges
        loss = loss + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        trainer.update(step, loss)
    return vae.eval()


@torch.no_grad()
def encode_scenes(
    work: Path, device: torch.device, vae: AutoencoderKL, count: int
) -> tuple[list[Scene], Tensor, dict[str, float]]:
    """Draws the training scenes; returns them with their packed, scaled latents."""
    rng = np.random.default_rng(3)
    scenes = [training_scene(rng) for _ in range(count)]
    path = work / f"latents_{count}.pt"
    if not path.exists():
        parts = []
        for start in progress("latents", range(0, count, 50)):
            pictures = np.stack([draw(s) for s in scenes[start : start + 50]])
            x = to_tensor(pictures).to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                mode = vae.encode(x).latent_dist.mode()
            parts.append(mode.float().cpu().contiguous().half())
        raw = torch.cat(parts)
        sample = raw[:5000].float()
        statistics = {
            "shift_factor": sample.mean().item(),
            "scaling_factor": 1 / sample.std().item(),
        }
        save({"raw": raw, "statistics": statistics}, path)
    stored = torch.load(path)
    statistics = stored["statistics"]
    log(work, stage="latents", count=count, **statistics)
    return scenes, stored["raw"], statistics


def pack(raw: Tensor, statistics: dict[str, float]) -> Tensor:
    """Latents ``(B, C, h, w)`` to tokens ``(B, h/2*w/2, 4C)``, zero mean, unit std."""
    x = (raw.float() - statistics["shift_factor"]) * statistics["scaling_factor"]
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)


def train_flow(
    work: Path, model: DemoModel, scenes: list[Scene], latents: Tensor, steps: int
) -> None:
    """Flow matching of transformer and text encoders, with caption dropout.

    Half-way through the blocks the patches must also tell which object they belong to,
    and the words of a phrase which object they speak of and where it will be. That
    teaches shapes and binding many times faster than velocities alone: the idea of Yu
    et al., "Representation Alignment for Generation", 2024, arXiv:2410.06940, with the
    scene's own description in place of another network.
    """
    labels = [np.stack(part) for part in zip(*map(patch_labels, scenes), strict=True)]
    hidden: list[Tensor] = []
    listening = model.transformer.single_transformer_blocks[2].register_forward_hook(
        lambda module, inputs, output: hidden.append(output[1])
    )
    trainer = Trainer(work, "flow", model, steps, peak=1.5e-3, dtype=torch.bfloat16)
    statistics = torch.load(next(work.glob("latents_*.pt")))["statistics"]
    device = model.image_ids.device
    for step in trainer.steps():
        rng = np.random.default_rng((4, step))
        index = rng.integers(0, len(scenes), size=64)
        captions = [
            "" if rng.random() < CAPTION_DROPOUT else spoken(rng, scenes[i])
            for i in index
        ]
        data = pack(latents[torch.from_numpy(index)], statistics).to(device)
        noise, sigma = noise_and_sigma(rng, data)
        noisy = torch.lerp(data, noise, sigma[:, None, None])
        guidance = torch.ones_like(sigma)
        text, pooled = model.encode(captions)
        velocity = model(noisy, sigma, guidance, text, pooled)
        loss = F.mse_loss(velocity.float(), noise - data)
        shape, colour, place = (x[index] for x in labels)
        told = model.patch_head(hidden.pop())
        helper = named_loss(told, shape, colour, place, (1, 1))
        words = word_labels(model.t5_tokenizer, captions, [scenes[i] for i in index])
        helper = helper + named_loss(model.word_head(text), *words, (0, 0))
        trainer.update(step, loss, helper)
    listening.remove()


def word_labels(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], scenes: list[Scene]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape, colour (indices, -100 for none) and centre of each token's object."""
    size = (len(captions), TEXT_LENGTH)
    shape, colour = np.full(size, -100), np.full(size, -100)
    centre = np.zeros((*size, 2), np.float32)
    spans = tokenizer(
        captions,
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_offsets_mapping=True,
        return_tensors="np",
    ).offset_mapping
    for row, (text, scene) in enumerate(zip(captions, scenes, strict=True)):
        if not text:
            continue
        stop = 0
        for item in scene.objects:
            start = text.lower().index(item.phrase, stop)
            stop = start + len(item.phrase)
            is_inside = (spans[row, :, 0] < stop) & (spans[row, :, 1] > start)
            shape[row, is_inside] = SHAPES.index(item.shape)
            colour[row, is_inside] = list(COLOURS).index(item.colour)
            centre[row, is_inside] = item.centre_x - 0.5, item.centre_y - 0.5
    return shape, colour, centre


def named_loss(
    told: Tensor,
    shape: np.ndarray,
    colour: np.ndarray,
    place: np.ndarray,
    extra_classes: tuple[int, int],
) -> Tensor:
    """Cross entropy of shape and colour plus the error of the place.

    Args:
        told: ``(B, S, shapes + colours + 2)``.
        shape: int64 ``(B, S)``; -100 is left out, beyond ``SHAPES`` has no place.
        colour: int64 ``(B, S)``, likewise.
        place: float32 ``(B, S, 2)``.
        extra_classes: Classes beyond ``SHAPES`` and ``COLOURS``.
    """
    sizes = (len(SHAPES) + extra_classes[0], len(COLOURS) + extra_classes[1], 2)
    shapes, colours, places = told.float().flatten(0, 1).split(sizes, dim=-1)
    is_object = torch.from_numpy((shape >= 0) & (shape < len(SHAPES))).flatten()
    wanted = [
        torch.from_numpy(x).to(told.device).flatten(0, 1) for x in (shape, colour)
    ]
    error = F.smooth_l1_loss(
        places[is_object],
        torch.from_numpy(place).to(told.device).flatten(0, 1)[is_object],
    )
    return (
        F.cross_entropy(shapes, wanted[0])
        + F.cross_entropy(colours, wanted[1])
        + 0.5 * error
    )


def distill_guidance(
    work: Path, model: DemoModel, scenes: list[Scene], latents: Tensor, steps: int
) -> None:
    """Teaches one pass what classifier-free guidance needs two for (as FLUX.1-dev).

    Meng et al., "On Distillation of Guided Diffusion Models", 2022, arXiv:2210.03142.
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    trainer = Trainer(work, "distill", model, steps, peak=4e-4, dtype=torch.bfloat16)
    teacher.to(torch.bfloat16)
    statistics = torch.load(next(work.glob("latents_*.pt")))["statistics"]
    device = model.image_ids.device
    for step in trainer.steps():
        rng = np.random.default_rng((5, step))
        index = rng.integers(0, len(scenes), size=64)
        captions = [
            "" if rng.random() < CAPTION_DROPOUT / 2 else spoken(rng, scenes[i])
            for i in index
        ]
        data = pack(latents[torch.from_numpy(index)], statistics).to(device)
        noise, sigma = noise_and_sigma(rng, data)
        noisy = torch.lerp(data, noise, sigma[:, None, None])
        one = torch.ones_like(sigma)
        with torch.no_grad():
            told = teacher(noisy, sigma, one, *teacher.encode(captions)).float()
            blank = [""] * len(captions)
            untold = teacher(noisy, sigma, one, *teacher.encode(blank)).float()
        scale = rng.uniform(*GUIDANCE_RANGE, size=len(captions)).astype(np.float32)
        guidance = torch.from_numpy(scale).to(device)
        target = untold + guidance[:, None, None] * (told - untold)
        velocity = model(noisy, sigma, guidance, *model.encode(captions))
        trainer.update(step, F.mse_loss(velocity.float(), target))


def noise_and_sigma(rng: np.random.Generator, data: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian noise and logit-normal sigmas, leaning to the noisy side."""
    noise = rng.standard_normal(tuple(data.shape), dtype=np.float32)
    sigma = 1 / (1 + np.exp(-rng.normal(0.4, 1.1, size=len(data))))
    on = data.device
    return torch.from_numpy(noise).to(on), torch.from_numpy(sigma).float().to(on)


def export(
    output: Path, vae: AutoencoderKL, model: DemoModel, statistics: dict[str, float]
) -> None:
    """Writes the diffusers folder, weights in bfloat16."""
    vae.register_to_config(**statistics)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae.float(),
        text_encoder=model.clip,
        tokenizer=model.clip_tokenizer,
        text_encoder_2=model.t5,
        tokenizer_2=model.t5_tokenizer,
        transformer=model.transformer,
    )
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(output)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Pictures uint8 NHWC to float32 NCHW in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    main()
