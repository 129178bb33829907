"""FLUX.1's transformer in a file of its own, and files that hold more of the model.

Named as Black Forest Labs do or as diffusers does; alone, or as ComfyUI's files have
it, under a prefix beside the text encoders and the autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from ...checkpoint import (
    AbstractTensor,
    CheckpointFile,
    ComponentWeights,
    WeightTransform,
    joined,
    shown,
    without_float8,
)
from ...components import from_ldm, is_ldm
from ...errors import ModelLoadError
from .config import flux1_config
from .names import bfl_modules

_PREFIXES: Final = MappingProxyType(
    {
        "model.diffusion_model.": "transformer",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.t5xxl.transformer.": "text_encoder_2",
        "vae.": "vae",
        "first_stage_model.": "vae",
    }
)
# Of ComfyUI's text encoders, for what they can do beside encoding.
_UNUSED: Final = ("text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale")
# A GGUF file's word for what it holds; two writers' words are no architecture's.
_ARCHITECTURES: Final = ("flux", "pig", "cow")
# What a tensor's name tells of models that are no FLUX.1 transformer, the surest first.
_OTHERS: Final = MappingProxyType(
    {
        "an adapter (LoRA)": ("lora", "lokr_", "loha_", "hada_"),
        "a FLUX.2 transformer": ("double_stream_modulation",),
        "a Chroma transformer": ("distilled_guidance_layer.",),
        "a HunyuanVideo transformer": ("individual_token_refiner.",),
        "a Stable Diffusion 3 transformer": ("joint_blocks.",),
        "a ControlNet": ("controlnet_",),
        "an autoencoder": ("decoder.mid.", "decoder.mid_block."),
        "a text encoder": ("text_model.", "encoder.block.", "enc.blk."),
        "a UNet, as of Stable Diffusion": (
            *("input_blocks.", "middle_block.", "output_blocks."),
            *("down_blocks.", "mid_block."),
        ),
    }
)
_BFL: Final = ("double_blocks.", "single_blocks.")
_DIFFUSERS: Final = ("transformer_blocks.", "single_transformer_blocks.")
_NORMS: Final = (".query_norm", ".key_norm")


def flux1_parts(file: CheckpointFile) -> Mapping[str, WeightTransform]:
    """Which components a file holds, and how each is read.

    Raises:
        ModelLoadError: It holds no FLUX.1 transformer, something beside it that is
            not known, or a component twice.
    """
    architecture = file.told.get("general.architecture")
    if architecture is not None and architecture not in _ARCHITECTURES:
        raise ModelLoadError(
            f"transformer: {file.path.name} is a GGUF of architecture "
            f"{architecture!r:.60}; expected 'flux'"
        )
    found = {
        prefix: role
        for prefix, role in _PREFIXES.items()
        if any(name.startswith(prefix) for name in file.tensors)
    }
    inner = "model.diffusion_model." if "transformer" in found.values() else ""
    own = (name for name in file.tensors if name.startswith(inner))
    names = [name.removeprefix(inner) for name in own]
    is_bfl = any(name.startswith(_BFL) for name in names)
    is_flux = is_bfl or any(name.startswith(_DIFFUSERS) for name in names)
    other = _other(names)
    if other or not is_flux:
        what, name = other or ("no transformer", next(iter(names), "nothing"))
        raise ModelLoadError(
            f"transformer: {file.path.name} holds {what} ({shown(name)}); expected a "
            "FLUX.1 transformer, named as by Black Forest Labs or diffusers"
        )
    transformer = partial(_transformer, file=file, prefix=inner, is_bfl=is_bfl)
    if not inner:
        return {"transformer": transformer}
    known = (*found, *_UNUSED)
    left = [name for name in file.tensors if not name.startswith(known)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ModelLoadError(
            f"transformer: {file.path.name}: {shown(left[0])}{more} belong to no "
            f"component that is known ({', '.join(_PREFIXES)}); take another file of "
            "the model"
        )
    first: dict[str, str] = {}
    for prefix, role in found.items():
        if first.setdefault(role, prefix) != prefix:
            raise ModelLoadError(
                f"transformer: {file.path.name}: {first[role]} and {prefix} both hold "
                f"the {role}; take a file with one of them"
            )
    readers: Mapping[str, Callable[..., ComponentWeights]] = {
        "transformer": transformer,
        "vae": _autoencoder,
    }
    return {
        role: partial(readers.get(role, _encoder), file=file, prefix=prefix)
        for prefix, role in found.items()
    }


def _other(names: list[str]) -> tuple[str, str] | None:
    """What else the names are of, and the name that tells."""
    for what, marks in _OTHERS.items():
        for name in names:
            if any(mark in name for mark in marks):
                return what, name
    return None


def _encoder(
    config: Mapping[str, Any],
    weights: ComponentWeights,
    *,
    file: CheckpointFile,
    prefix: str,
) -> ComponentWeights:
    return without_float8(weights.under(prefix), file, prefix)


def _autoencoder(
    config: Mapping[str, Any],
    weights: ComponentWeights,
    *,
    file: CheckpointFile,
    prefix: str,
) -> ComponentWeights:
    own = without_float8(weights.under(prefix), file, prefix)
    return from_ldm(config, own) if is_ldm(own) else own


def _transformer(
    config: Mapping[str, Any],
    weights: ComponentWeights,
    *,
    file: CheckpointFile,
    prefix: str,
    is_bfl: bool,
) -> ComponentWeights:
    own = without_float8(weights.under(prefix), file, prefix)
    return from_bfl(config, own) if is_bfl else own


def from_bfl(config: Mapping[str, Any], weights: ComponentWeights) -> ComponentWeights:
    """Tensors by diffusers' names.

    Args:
        config: The transformer's ``config.json``.
        weights: By Black Forest Labs' names, fused as theirs.
    """
    sizes = flux1_config(config)
    # No more blocks than tensors, whatever the configuration says.
    most = len(weights.tensors)
    counts = (sizes.num_layers, sizes.num_single_layers)
    modules = bfl_modules(*(min(count, most) for count in counts))

    def recipe(files: ComponentWeights, name: str) -> AbstractTensor:
        module, _, kind = name.rpartition(".")
        rows = modules.get(module)
        if rows is None:
            return files[name]
        whole = files[_stored_name(files, rows.module, kind)]
        if rows.shares == 1:
            return whole
        parts = [
            whole.split(start, stop - start, rows.shares - stop)[1]
            for start, stop in rows.parts
        ]
        return parts[0] if len(parts) == 1 else joined(parts)

    held = [
        f"{module}.{kind}"
        for module, rows in modules.items()
        for kind in ("weight", "bias")
        if _stored_name(weights, rows.module, kind) in weights.tensors
    ]
    return weights.through(recipe, held)


def _stored_name(weights: ComponentWeights, module: str, kind: str) -> str:
    """A tensor's name; of norms ComfyUI writes diffusers' since the end of 2025."""
    name = f"{module}.{kind}"
    is_scale = module.endswith(_NORMS) and kind == "weight"
    return f"{module}.scale" if is_scale and name not in weights.tensors else name
