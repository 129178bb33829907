"""LoRA files as other programs write them, on random weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

NAMINGS: Final = ("peft", "base-model", "kohya", "comfy", "comfy-down", "xlabs")
# What each fuses, as they write it themselves: file's module to ours, in order.
_DOUBLE: Final = {
    "{s}_attn.qkv": ("attn.to_q attn.to_k attn.to_v", "attn.add_{}_proj"),
    "{s}_attn.proj": ("attn.to_out.0", "attn.to_add_out"),
    "{s}_mlp.0": ("ff.net.0.proj", "ff_context.net.0.proj"),
    "{s}_mlp.2": ("ff.net.2", "ff_context.net.2"),
    "{s}_mod.lin": ("norm1.linear", "norm1_context.linear"),
}
_SINGLE: Final = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OTHER: Final = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def matrices(folder: Path, component: str) -> Shapes:
    """Shapes of a component's matrices, by module."""
    name = "diffusion_pytorch_model" if component == "transformer" else "model"
    tensors = load_file(folder / component / f"{name}.safetensors")
    return {
        key.removesuffix(".weight"): tuple(tensor.shape)
        for key, tensor in tensors.items()
        if tensor.ndim == 2 and ".weight" in key and "embed" not in key.split(".")[-2]
    }


def fused(shapes: Shapes, *, extras: bool = False) -> dict[str, tuple[str, ...]]:
    """Black Forest Labs' modules, each with those of ours that it holds, in order."""
    found: dict[str, tuple[str, ...]] = {}
    for module in shapes:
        if match := re.fullmatch(r"transformer_blocks\.(\d+)\.norm1\.linear", module):
            own = f"transformer_blocks.{match[1]}"
            for place, stream in enumerate(("img", "txt")):
                for name, ours in _DOUBLE.items():
                    parts = ours[place].split()
                    if "{}" in ours[place]:
                        parts = [ours[place].format(head) for head in "qkv"]
                    stem = f"double_blocks.{match[1]}.{name.format(s=stream)}"
                    found[stem] = tuple(f"{own}.{part}" for part in parts)
        if match := re.fullmatch(r"single_transformer_blocks\.(\d+)\.proj_out", module):
            own = f"single_transformer_blocks.{match[1]}"
            for name, several in _SINGLE.items():
                stem = f"single_blocks.{match[1]}.{name}"
                found[stem] = tuple(f"{own}.{part}" for part in several)
    if extras:
        found |= {stem: (name,) for stem, name in _OTHER.items()}
    return found


def xlabs(shapes: Shapes) -> dict[str, tuple[str, ...]]:
    """XLabs' modules, each with those of ours that it holds, in order."""
    found: dict[str, tuple[str, ...]] = {}
    for stem, own in fused(shapes).items():
        block = stem.rpartition(".")[0]
        for pattern, what, parts in (
            ("img_attn.qkv", "qkv_lora1", own),
            ("txt_attn.qkv", "qkv_lora2", own),
            ("img_attn.proj", "proj_lora1", own),
            ("txt_attn.proj", "proj_lora2", own),
            ("linear1", "qkv_lora", own[:3]),
            ("linear2", "proj_lora", own),
        ):
            if stem.endswith(f".{pattern}"):
                root = block if "_attn" not in pattern else stem[: -len(pattern) - 1]
                found[f"{root}.processor.{what}"] = parts
    return found


def pair(
    shapes: Shapes, modules: tuple[str, ...], index: int, strength: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Halves for modules fused below each other, and an alpha; the rank varies."""
    rank = 2 + index % 4
    rows = sum(shapes[module][0] for module in modules)
    columns = shapes[modules[0]][1]
    down = torch.randn(rank, columns) / columns**0.5
    up = strength * torch.randn(rows, rank) / rank**0.5
    return down, up, (rank + 1) / 2


def lora(
    naming: str,
    transformer: Shapes,
    text_encoder: Shapes | None = None,
    *,
    seed: int = 0,
    strength: float = 0.3,
    extras: bool = False,
) -> Tensors:
    """Tensors of a LoRA on all attention, feed-forward and modulation layers."""
    torch.manual_seed(seed)
    tensors: Tensors = {}
    ends = {
        "peft": ("lora_A.weight", "lora_B.weight"),
        "base-model": ("lora_A.weight", "lora_B.weight"),
        "comfy": ("lora_A.weight", "lora_B.weight"),
        "xlabs": ("down.weight", "up.weight"),
    }.get(naming, ("lora_down.weight", "lora_up.weight"))
    has_alpha = naming not in ("xlabs", "base-model")
    named: dict[str, tuple[str, ...]] = {}
    if naming in ("peft", "base-model"):
        root = "transformer." if naming == "peft" else "base_model.model."
        named = {
            root + name: (name,) for name in transformer if extras or "blocks" in name
        }
    elif naming == "xlabs":
        named = xlabs(transformer)
    else:
        root = "lora_unet_" if naming == "kohya" else "diffusion_model."
        for stem, own in fused(transformer, extras=extras).items():
            flat = stem.replace(".", "_") if naming == "kohya" else stem
            named[root + flat] = own
    shapes = dict(transformer)
    if text_encoder is not None:
        for name, shape in text_encoder.items():
            nested = f"text_model.{name.removeprefix('text_model.')}"
            stem = {
                "peft": f"text_encoder.{nested}",
                "kohya": f"lora_te1_{nested.replace('.', '_')}",
            }.get(naming, f"text_encoders.clip_l.transformer.{nested}")
            named[stem] = (name,)
            shapes[name] = shape
    for index, (stem, own) in enumerate(named.items()):
        down, up, alpha = pair(shapes, own, index, strength)
        if stem.startswith("text_encoder."):
            alpha = 2.0  # diffusers loses those that differ, of its own naming
        tensors[f"{stem}.{ends[0]}"], tensors[f"{stem}.{ends[1]}"] = down, up
        if has_alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def load(path: Path) -> Tensors:
    return load_file(path)
