"""The autoencoder's encoder alone, and bfloat16 on CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from folders import TEST_GRAPHS
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Module

from graphs.denoiser import StepGraphs
from graphs.flux1 import Flux1Denoiser
from graphs.rotary import image_ids, rotary_table
from graphs.weights import WeightScope
from max_diffusion.checkpoint import ComponentWeights, find_model
from max_diffusion.components import AutoencoderKLEncoder
from max_diffusion.core.buffers import to_device, to_numpy
from max_diffusion.execution.compiler import CompiledGraphs
from max_diffusion.execution.graph_library import GraphLibrary
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.models.flux1.config import flux1_config

if TYPE_CHECKING:
    from diffusers import FluxPipeline


def encoder_of(path: Path) -> AutoencoderKLEncoder:
    """The folder's encoder, without its graphs."""
    folder = find_model(path)
    weights = ComponentWeights.from_files("vae", folder.weight_files("vae"))
    encoder = AutoencoderKLEncoder(folder.config("vae"), "float32", [CPU()], weights)
    encoder.name = "vae_encoder"
    return encoder


@pytest.fixture(scope="module")
def models(flux_folder: Path) -> Iterator[dict[str, Model]]:
    folder, host = find_model(flux_folder), DeviceRef.CPU()
    sizes = flux1_config(folder.config("transformer"))
    encoder = encoder_of(flux_folder)

    def build_half(module: Module) -> WeightScope:
        # As on a processor that multiplies no bfloat16: as the tests' graphs are.
        half = WeightScope("transformer", DType.bfloat16, host, products=DType.float32)
        denoiser = Flux1Denoiser(sizes, DType.bfloat16, host)
        StepGraphs(module, denoiser, half).add_full()
        return half

    modules = [
        GraphModule("vae_encoder", encoder.build_graphs, is_for_cpu=True),
        GraphModule("transformer.full", build_half, is_for_cpu=True),
    ]
    filled: dict[str, np.ndarray | Buffer] = {}
    for needs in (module.needs for module in modules):
        role = needs.prefix.partition("_")[0]
        files = folder.weight_files(role)
        loaded = ComponentWeights.from_files(role, files).load(needs.slots)
        filled |= {f"{needs.prefix}.{key}": array for key, array in loaded.items()}
    folders = [TEST_GRAPHS / name for name in ("bfloat16", "float32")]
    library = GraphLibrary(CPU(), folders)
    compiled = CompiledGraphs(InferenceSession(devices=[CPU()]), CPU(), library)
    compiled.add(modules, lambda: filled)
    yield dict(compiled.models)  # while the weights are alive


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (2, 12, 20)])
def test_encoder_equals_diffusers(
    models: dict[str, Model],
    flux_folder: Path,
    reference: FluxPipeline,
    batch: int,
    height: int,
    width: int,
) -> None:
    rng = np.random.default_rng(height)
    picture = rng.uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
    noise = rng.standard_normal((batch, height // 2, width // 2, 5), np.float32)
    encoder = encoder_of(flux_folder)
    encoder.bind(models)
    with torch.no_grad():
        wanted = reference.vae.encode(
            torch.from_numpy(picture).permute(0, 3, 1, 2)
        ).latent_dist
    config = reference.vae.config
    for drawn in (noise, np.zeros_like(noise)):
        ours = to_numpy(encoder.encode(picture, drawn))
        cells = wanted.mean + wanted.std * torch.from_numpy(drawn).permute(0, 3, 1, 2)
        cells = (cells - config.shift_factor) * config.scaling_factor
        theirs = reference._pack_latents(cells, batch, 5, height // 2, width // 2)
        assert np.abs(ours - theirs.numpy()).max() < 1e-4


def test_bfloat16_is_as_close_to_float32_as_in_diffusers(
    models: dict[str, Model], reference: FluxPipeline
) -> None:
    rng = np.random.default_rng(1)
    config = reference.transformer.config
    rows, columns, text_len, batch = 6, 7, 9, 2
    ids = image_ids(rows, columns)
    arrays = {
        "latents": rng.standard_normal((batch, rows * columns, config.in_channels)),
        "timestep": rng.uniform(1, 1000, batch),
        "text": rng.standard_normal((batch, text_len, config.joint_attention_dim)),
        "pooled_text": rng.standard_normal((batch, config.pooled_projection_dim)),
    }
    tensors = {name: torch.from_numpy(a).float() for name, a in arrays.items()}
    tables = [
        rotary_table(places, config.axes_dims_rope)
        for places in (np.zeros((text_len, 3)), ids)
    ]
    given = [
        to_device(tensors[name].numpy(), CPU()) for name in ("latents", "timestep")
    ]
    for name in ("text", "pooled_text"):
        bits = tensors[name].bfloat16().view(torch.int16).numpy()
        shape = tuple(tensors[name].shape)
        given.append(to_device(bits, CPU()).view(DType.bfloat16, shape))
    given += [to_device(table, CPU()) for table in tables]
    ours = to_numpy(models["transformer.full"].execute(*given)[0])

    def theirs(dtype: torch.dtype) -> np.ndarray:
        transformer = copy.deepcopy(reference.transformer).to(dtype)
        with torch.no_grad():
            prediction = transformer(
                hidden_states=tensors["latents"].to(dtype),
                timestep=(tensors["timestep"] / 1000).to(dtype),
                encoder_hidden_states=tensors["text"].to(dtype),
                pooled_projections=tensors["pooled_text"].to(dtype),
                img_ids=torch.from_numpy(ids),
                txt_ids=torch.zeros(text_len, 3),
                return_dict=False,
            )[0]
        return prediction.float().numpy()

    exact = theirs(torch.float32)
    error = np.abs(ours.astype(np.float32) - exact).mean()
    assert 0 < error < 1.5 * np.abs(theirs(torch.bfloat16) - exact).mean()
