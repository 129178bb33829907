"""BFL's names of a FLUX.1 transformer against diffusers' own conversion."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
)

from max_diffusion.models.flux1.names import bfl_modules, diffusers_modules

# The one that diffusers' conversion knows; other sizes are tiny.
WIDTH = 3072


def diffusers_shapes(has_guidance: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4,
            pooled_projection_dim=4,
            guidance_embeds=has_guidance,
            axes_dims_rope=(16, 56, 56),
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def bfl_tensor(module: str, kind: str) -> str:
    is_norm = module.endswith(("query_norm", "key_norm"))
    return f"{module}.{'scale' if is_norm else kind}"


@pytest.mark.parametrize("has_guidance", [False, True])
def test_rows_are_those_that_diffusers_converts(has_guidance: bool) -> None:
    wanted, names = diffusers_shapes(has_guidance), bfl_modules(2, 3)
    rows: dict[str, int] = {}
    for name, shape in wanted.items():
        module, _, kind = name.rpartition(".")
        source = names[module]
        key = bfl_tensor(source.module, kind)
        rows[key] = rows.get(key, 0) + shape[0]
    # One column is enough: conversion moves rows.
    checkpoint = {key: torch.rand(count, 1) for key, count in rows.items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    assert converted.keys() == wanted.keys()
    for name, tensor in converted.items():
        module, _, kind = name.rpartition(".")
        source = names[module]
        whole = checkpoint[bfl_tensor(source.module, kind)]
        ours = [whole[slice(*ends)] for ends in source.ranges(len(whole))]
        assert torch.equal(torch.cat(ours), tensor), name


def test_both_directions_agree() -> None:
    names, back = bfl_modules(2, 3), diffusers_modules(2, 3)
    assert sorted(name for found in back.values() for name in found) == sorted(names)
    for original, found in back.items():
        parts = sorted(part for name in found for part in names[name].parts)
        assert {names[name].module for name in found} == {original}
        # Ranges follow each other, and are all of it.
        shares = {names[name].shares for name in found}
        assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
        assert {parts[-1][1]} == shares
