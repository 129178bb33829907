"""Checkpoint files of other programs, made of a folder's tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
NET, VAE = "model.diffusion_model.", "vae."
CLIP, T5 = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
WEIGHTS = "diffusion_pytorch_model.safetensors"

# diffusers' names to Black Forest Labs', as the published files have them.
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_FUSED = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
)


def as_bfl(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """A FLUX.1 transformer's tensors by Black Forest Labs' names."""
    stored: Tensors = {}
    fused: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        double = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        single = re.fullmatch(r"single_transformer_blocks\.(\d+)\.(.+)", stem)
        if double:
            index, own = double.groups()
            last = own.rpartition(".")[2]
            for stream, names in zip(("img", "txt"), _FUSED, strict=True):
                if own == f"attn.{last}" and last in names:
                    whole = f"double_blocks.{index}.{stream}_attn.qkv.{kind}"
                    fused.setdefault(whole, {})[names.index(last)] = tensor
                    break
            else:
                kind = "scale" if ".norm_" in own else kind
                stored[f"double_blocks.{index}.{_DOUBLE[own]}.{kind}"] = tensor
        elif single:
            index, own = single.groups()
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            if own in parts:
                whole = f"single_blocks.{index}.linear1.{kind}"
                fused.setdefault(whole, {})[parts.index(own)] = tensor
            else:
                kind = "scale" if ".norm_" in own else kind
                stored[f"single_blocks.{index}.{_SINGLE[own]}.{kind}"] = tensor
        elif stem == "norm_out.linear":
            stored[f"{_ENDS[stem]}.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
        else:
            stored[f"{_ENDS[stem]}.{kind}"] = tensor
    for name, members in fused.items():
        stored[name] = torch.cat([members[index] for index in sorted(members)])
    return stored


def from_bfl(stored: Mapping[str, torch.Tensor], like: Tensors) -> Tensors:
    """The way back, by where numbers come to lie; diffusers' own is for one width.

    Args:
        stored: By Black Forest Labs' names.
        like: Tensors of the same shapes by diffusers' names.
    """
    count = sum(tensor.numel() for tensor in like.values())
    places = torch.arange(count).split([tensor.numel() for tensor in like.values()])
    moved = as_bfl(
        {
            name: place.reshape(tensor.shape)
            for (name, tensor), place in zip(like.items(), places, strict=True)
        }
    )
    numbers = torch.full((count,), float("nan"))
    for name, place in moved.items():
        numbers[place] = stored[name].float()
    return {
        name: numbers[place].reshape(tensor.shape)
        for (name, tensor), place in zip(like.items(), places, strict=True)
    }


def as_ldm(tensors: Mapping[str, torch.Tensor], levels: int) -> Tensors:
    """An autoencoder's tensors by the names of latent diffusion."""
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"conv_norm_out", lambda m: "norm_out"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (
            r"mid_block\.attentions\.0\.(.+)\.(weight|bias)$",
            lambda m: f"mid.attn_1.{attention[m[1]]}.{m[2]}",
        ),
        (r"down_blocks\.(\d)\.resnets\.", lambda m: f"down.{m[1]}.block."),
        (r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
        (
            r"up_blocks\.(\d)\.resnets\.",
            lambda m: f"up.{levels - 1 - int(m[1])}.block.",
        ),
        (
            r"up_blocks\.(\d)\.upsamplers\.0",
            lambda m: f"up.{levels - 1 - int(m[1])}.upsample",
        ),
        (r"conv_shortcut", lambda m: "nin_shortcut"),
    ]
    stored = {}
    for name, tensor in tensors.items():
        own = name
        for pattern, form in rules:
            own = re.sub(pattern, form, own)
        is_matrix = "mid_block.attentions" in name and tensor.ndim == 2
        stored[own] = tensor[:, :, None, None] if is_matrix else tensor
    return stored


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def tensors_of(folder: Path, role: str) -> Tensors:
    """All weights of a component of a folder."""
    (file,) = (folder / role).glob("*.safetensors")
    return load_file(file)


def all_in_one(folder: Path, levels: int) -> Tensors:
    """A folder's components as one of ComfyUI's checkpoints has them."""
    return {
        **prefixed(NET, as_bfl(tensors_of(folder, "transformer"))),
        **prefixed(CLIP, tensors_of(folder, "text_encoder")),
        **prefixed(T5, tensors_of(folder, "text_encoder_2")),
        **prefixed(VAE, as_ldm(tensors_of(folder, "vae"), levels)),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
        "text_encoders.t5xxl.logit_scale": torch.tensor(4.6),
    }


def saved(path: Path, tensors: Mapping[str, torch.Tensor], **told: str) -> Path:
    """Writes a safetensors file."""
    # Copies: the format refuses tensors that share memory.
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, path, metadata=told or None)
    return path


def in_float8(tensors: Mapping[str, torch.Tensor], scale_name: str = "") -> Tensors:
    """Matrices in float8, with a scale each if that has a name."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            stored[name] = tensor
            continue
        scale = tensor.abs().max() / 448 if scale_name else torch.ones(())
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        if scale_name:
            stored[name.removesuffix("weight") + scale_name] = scale
    return stored


def saved_gguf(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    arch: str = "flux",
) -> tuple[Path, Tensors]:
    """Writes a GGUF file, matrices quantised; also returns what its numbers stand for.

    A matrix whose rows are no multiple of a block is flattened, as ComfyUI's converter
    does with other models' than FLUX.1's.
    """
    writer = gguf.GGUFWriter(path, arch)
    meant: Tensors = {}
    block = gguf.GGML_QUANT_SIZES[kind][0]
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if array.ndim < 2 or array.size % block:
            writer.add_tensor(name, np.ascontiguousarray(array))
            meant[name] = tensor.float()
            continue
        rows = array
        if array.shape[-1] % block:
            rows = array.reshape(-1, block)
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(array.shape))
        stored = gguf.quants.quantize(rows, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        numbers = gguf.quants.dequantize(stored, kind).reshape(array.shape)
        meant[name] = torch.from_numpy(np.array(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, meant
