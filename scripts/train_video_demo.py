"""Trains a video demo model of the CogVideoX family, from only this script.

Four stages, each written to ``--work`` when done and skipped when already there, so an
interrupted run continues where it stopped: autoencoder, its decoder alone, latents,
diffusion (transformer and text encoder together). The result is one diffusers-layout
folder that diffusers' ``CogVideoXPipeline`` loads too.

    .venv/bin/python scripts/train_video_demo.py --output demo_video

The decoder changes no latents: with ``--only decoder``, a second process trains it
while the first one is at the stages after it.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from demo_tokenizers import build_t5_tokenizer
from demo_trainer import Trainer, attention, log, progress, save
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from max_diffusion.demo.clips import (
    CLIP_COLOURS,
    CLIP_FRAMES,
    CLIP_SHAPES,
    CLIP_SIZE_PX,
    MOTIONS,
    Clip,
    MovingObject,
    cell_labels,
    clip_caption,
    draw_clip,
    training_clip,
)
from max_diffusion.pipelines.generation_defaults import DEFAULTS_FILE

TEXT_LENGTH = 24  # padding and end token included; the longest caption takes 21
LATENT_CHANNELS = 8
LATENT_FRAMES = 5
LATENT_SIZE = 8
PATCH = 2
CELLS = LATENT_SIZE // PATCH
HEADS, HEAD_SIZE = 4, 32
WIDTH = HEADS * HEAD_SIZE
CAPTION_DROPOUT = 0.1
_MOST_NOISE = 0.1  # of latents, whose deviation is about one
CLASSES = (len(CLIP_SHAPES), len(CLIP_COLOURS), len(MOTIONS))


def main() -> None:
    """Runs every stage that is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, default=Path("demo_video_work"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=("decoder", "diffusion"))
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--diffusion-steps", type=int, default=13000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    vae = train_autoencoder(args.work, args.autoencoder_steps)
    if args.only != "diffusion":
        train_decoder(args.work, vae, args.decoder_steps)
    if args.only == "decoder":
        return
    clips, latents, scale = encode_clips(args.work, vae, args.clips)
    model = VideoDemoModel()
    train_diffusion(
        args.work, model, clips, latents * scale, args.diffusion_steps, args.batch
    )
    if args.only is None:
        export(args.output, vae, model, scale)


class VideoDemoModel(nn.Module):
    """The CogVideoX transformer with its text encoder, trained as one.

    ``forward`` takes latents ``(B, 5, C, 8, 8)``, timesteps ``(B,)`` and captions'
    states ``(B, 24, D)``, and predicts the velocity.
    """

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        captions = [spoken(rng, training_clip(rng)) for _ in range(20_000)]
        self.tokenizer = build_t5_tokenizer(captions, TEXT_LENGTH)
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=96,
                d_kv=32,
                num_heads=3,
                d_ff=256,
                num_layers=2,
                num_decoder_layers=0,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        self.transformer = CogVideoXTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_SIZE,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            time_embed_dim=64,
            text_embed_dim=96,
            num_layers=6,
            sample_width=LATENT_SIZE,
            sample_height=LATENT_SIZE,
            sample_frames=CLIP_FRAMES,
            patch_size=PATCH,
            temporal_compression_ratio=4,
            max_text_seq_length=TEXT_LENGTH,
            use_rotary_positional_embeddings=True,
        )
        # Only trained with, see train_diffusion: what each cell will show, and what the
        # object is that each word speaks of.
        self.cell_head = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, sum(CLASSES) + 3 + 2),
        )
        self.word_head = nn.Linear(96, sum(CLASSES))
        # Each block starts as the identity and the prediction as zero, as in DiT.
        for name, module in self.transformer.named_modules():
            if name.endswith(("norm1.linear", "norm2.linear")) or (
                name in ("proj_out", "norm_out.linear")
            ):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.rotary = get_3d_rotary_pos_embed(
            embed_dim=HEAD_SIZE,
            crops_coords=((0, 0), (CELLS, CELLS)),
            grid_size=(CELLS, CELLS),
            temporal_size=LATENT_FRAMES,
        )

    def encode(self, captions: list[str]) -> Tensor:
        """Text states ``(B, 24, D)``."""
        ids = self.tokenizer(
            captions,
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        # No attention mask: CogVideoXPipeline gives none, padding is part of the input.
        return self.t5(ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Predicts the velocity, shape of ``latents``."""
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text,
            timestep=timestep,
            image_rotary_emb=self.rotary,
            return_dict=False,
        )[0]


def spoken(rng: np.random.Generator, clip: Clip) -> str:
    """A fresh caption, now and then written as a sentence."""
    text = clip_caption(rng, clip)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def train_autoencoder(work: Path, steps: int) -> AutoencoderKLCogVideoX:
    """Trains the causal autoencoder on freshly drawn clips (L1, edges, KL)."""
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(16, 32, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_height=CLIP_SIZE_PX,
        sample_width=CLIP_SIZE_PX,
        scaling_factor=1.0,
    )
    trainer = Trainer(work, "autoencoder", vae, steps, peak=4e-3, dtype=torch.float32)
    for step in trainer.steps():
        x = _clips_of(step, steps)
        posterior = vae.encode(x).latent_dist
        loss = _difference(vae.decode(posterior.sample()).sample, x)
        loss = loss + 5e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        trainer.update(step, loss)
    return vae.eval()


def train_decoder(work: Path, vae: AutoencoderKLCogVideoX, steps: int) -> None:
    """Trains the decoder on, for latents that are not quite right."""
    trainer = Trainer(
        work, "decoder", vae.decoder, steps, peak=3e-3, dtype=torch.float32
    )
    for step in trainer.steps():
        x = _clips_of(step, steps, seed=5)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()
            # As a transformer leaves them: each clip with more or less noise.
            strength = _MOST_NOISE * torch.rand(len(z), 1, 1, 1, 1)
            z = z + strength * torch.randn_like(z)
        trainer.update(step, _difference(vae.decode(z).sample, x))


def _clips_of(step: int, steps: int, seed: int = 2) -> Tensor:
    """Fresh clips of a step, ``(B, 3, F, H, W)``.

    Quarters of half as many frames first, four times cheaper; whole clips, which are
    encoded and decoded in two chunks as ever after, for the last eighth.
    """
    rng = np.random.default_rng((seed, step))
    if step < steps * 7 // 8:
        frames = np.stack([_quarter(rng, training_clip(rng)) for _ in range(4)])
    else:
        frames = np.stack([draw_clip(training_clip(rng)) for _ in range(2)])
    return to_tensor(frames)


def _difference(y: Tensor, x: Tensor) -> Tensor:
    """L1 and L2 of pixels, and L1 of their edges.

    Edges are few pixels but most of what is seen: their gradients are weighed, too, and
    those in time, which are what moves.
    """
    error = y - x
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4))
    return error.abs().mean() + error.square().mean() + 0.4 * edges


def _quarter(rng: np.random.Generator, clip: Clip) -> np.ndarray:
    """Half the frames of a quarter with an object in it, uint8 ``(9, 32, 32, 3)``.

    Every second one in other colours, or some are learned long after the others.
    """
    frames = draw_clip(clip)
    start = int(rng.integers(0, CLIP_FRAMES - 8))
    item = clip.objects[int(rng.integers(len(clip.objects)))].at(start + 4)
    centre = np.array([item.centre_y, item.centre_x]) * CLIP_SIZE_PX
    corner = centre - 16 + rng.uniform(-10, 10, size=2)
    top, left = (np.clip(corner / 4, 0, 8).round() * 4).astype(int)
    part = frames[start : start + 9, top : top + 32, left : left + 32]
    if rng.random() < 0.5:
        flips = 255 * rng.integers(0, 2, size=3).astype(np.uint8)
        part = part[..., rng.permutation(3)] ^ flips
    return part


def encode_clips(
    work: Path, vae: AutoencoderKLCogVideoX, count: int
) -> tuple[list[Clip], Tensor, float]:
    """Draws the training clips; returns them with their latents and the scale."""
    rng = np.random.default_rng(3)
    clips = [training_clip(rng) for _ in range(count)]
    path = work / f"latents_{count}.pt"
    if not path.exists():
        groups = [clips[i : i + 10] for i in range(0, count, 10)]
        # One thread a process: a thread that waits for another takes its core's time.
        with Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
            encoded = pool.imap(partial(encode_group, vae), groups)
            parts = [next(encoded) for _ in progress("latents", range(len(groups)))]
        save(torch.from_numpy(np.concatenate(parts)), path)
    latents = torch.load(path).float()
    scale = 1 / latents[:2000].std().item()
    mean = latents[:2000].mean().item()
    log(work, stage="latents", count=count, scale=scale, mean=mean)
    return clips, latents, scale


@torch.no_grad()
def encode_group(vae: AutoencoderKLCogVideoX, clips: list[Clip]) -> np.ndarray:
    """Latents of some clips, float16 ``(B, 5, C, 8, 8)``."""
    frames = to_tensor(np.stack([draw_clip(clip) for clip in clips]))
    return vae.encode(frames).latent_dist.mode().transpose(1, 2).half().numpy()


def train_diffusion(
    work: Path,
    model: VideoDemoModel,
    clips: list[Clip],
    latents: Tensor,
    steps: int,
    batch: int,
) -> None:
    """Velocities of transformer and text encoder, with caption dropout.

    Half-way through the blocks the cells must also tell which object they belong to,
    and the words of a phrase which object they speak of, as in ``train_demo.py``.
    """
    hidden: list[Tensor] = []
    listening = model.transformer.transformer_blocks[2].register_forward_hook(
        lambda module, inputs, output: hidden.append(output[0])
    )
    trainer = Trainer(work, "diffusion", model, steps, peak=1.5e-3, dtype=torch.float32)
    alphas = demo_scheduler().alphas_cumprod
    for step in trainer.steps():
        rng = np.random.default_rng((4, step))
        index = rng.integers(0, len(clips), size=batch)
        chosen = [clips[i] for i in index]
        captions = [
            "" if rng.random() < CAPTION_DROPOUT else spoken(rng, clip)
            for clip in chosen
        ]
        data = latents[torch.from_numpy(index)]
        noise = torch.from_numpy(rng.standard_normal(data.shape, dtype=np.float32))
        # One of each part of the range: a quieter gradient than of free draws.
        places = (rng.permutation(batch) + rng.random(batch)) / batch * len(alphas)
        timestep = torch.from_numpy(places.astype(np.int64))
        signal = alphas[timestep].sqrt().float()[:, None, None, None, None]
        rest = (1 - alphas[timestep]).sqrt().float()[:, None, None, None, None]
        text = model.encode(captions)
        with patch.object(F, "scaled_dot_product_attention", attention):
            velocity = model(signal * data + rest * noise, timestep, text)
        loss = F.mse_loss(velocity, signal * noise - rest * data)
        helper = cell_loss(model.cell_head(hidden.pop()), chosen)
        helper = helper + word_loss(model, model.word_head(text), captions, chosen)
        trainer.update(step, loss, helper)
    listening.remove()


def cell_loss(told: Tensor, clips: list[Clip]) -> Tensor:
    """Cross entropy of what each cell shows, plus the error of its object's centre."""
    middle = (np.arange(CELLS) + 0.5) / CELLS
    across = np.stack(np.meshgrid(middle, middle), axis=-1).reshape(-1, 2)
    classes, offsets = [], []
    for clip in clips:
        table = np.array([class_indices(item) for item in clip.objects] + [CLASSES])
        for frame in [0, *range(2, CLIP_FRAMES, 4)]:
            owner = cell_labels(clip, frame, CELLS)
            classes.append(table[owner])
            places = [item.at(frame) for item in clip.objects]
            centres = [((p.centre_x, p.centre_y), p.radius) for p in places]
            centres.append(((0.0, 0.0), 1.0))
            centre = np.array([c for c, _ in centres])[owner]
            radius = np.array([r for _, r in centres])[owner]
            offsets.append((centre - across) / radius[:, None])
    wanted = torch.from_numpy(np.concatenate(classes))
    sizes = (*(size + 1 for size in CLASSES), 2)
    *logits, place = told.flatten(0, 1).split(sizes, dim=-1)
    is_object = wanted[:, 0] < CLASSES[0]
    offset = torch.from_numpy(np.concatenate(offsets).astype(np.float32))
    loss = 0.5 * F.smooth_l1_loss(place[is_object], offset[is_object])
    for part, column in zip(logits, wanted.T, strict=True):
        loss = loss + F.cross_entropy(part, column)
    return loss


def word_loss(
    model: VideoDemoModel, told: Tensor, captions: list[str], clips: list[Clip]
) -> Tensor:
    """Cross entropy of the object that each word of a phrase speaks of."""
    wanted = np.full((len(captions), TEXT_LENGTH, 3), -100)
    spans = model.tokenizer(
        captions,
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_offsets_mapping=True,
        return_tensors="np",
    ).offset_mapping
    for row, (text, clip) in enumerate(zip(captions, clips, strict=True)):
        if not text:
            continue
        begins = [text.lower().index(item.phrase) for item in clip.objects]
        ground = text.find(" on a ")
        ends = [*begins[1:], ground if ground >= 0 else len(text)]
        for item, begin, end in zip(clip.objects, begins, ends, strict=True):
            is_inside = (spans[row, :, 0] < end) & (spans[row, :, 1] > begin)
            wanted[row, is_inside] = class_indices(item)
    labels = torch.from_numpy(wanted).flatten(0, 1)
    loss = torch.zeros(())
    for part, column in zip(
        told.flatten(0, 1).split(CLASSES, dim=-1), labels.T, strict=True
    ):
        loss = loss + F.cross_entropy(part, column)
    return loss


def class_indices(item: MovingObject) -> tuple[int, int, int]:
    """Indices of an object's shape, colour and motion."""
    return (
        CLIP_SHAPES.index(item.shape),
        CLIP_COLOURS.index(item.colour),
        MOTIONS.index(item.motion),
    )


def demo_scheduler() -> CogVideoXDDIMScheduler:
    """The noise schedule of CogVideoX-5b, and the sampler of 2b.

    Its steps draw no noise: a cache is judged by how near it stays to the same video.
    """
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def export(
    output: Path, vae: AutoencoderKLCogVideoX, model: VideoDemoModel, scale: float
) -> None:
    """Writes the diffusers folder, weights in bfloat16, and its guidance.

    At CogVideoX's own, 6, shapes burst; of 1 to 3 this one was judged best.
    """
    vae.register_to_config(scaling_factor=scale)
    pipeline = CogVideoXPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.t5,
        vae=vae.float(),
        transformer=model.transformer,
        scheduler=demo_scheduler(),
    )
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(output)
    defaults = json.dumps({"true_cfg_scale": 1.5}, indent=1) + "\n"
    (output / DEFAULTS_FILE).write_text(defaults)


def to_tensor(frames: np.ndarray) -> Tensor:
    """Videos uint8 ``(B, F, H, W, 3)`` to float32 ``(B, 3, F, H, W)`` in -1..1."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


if __name__ == "__main__":
    main()
