"""What the pipelines do not run: the encoder half, and bfloat16 on CPU."""

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
from max.graph import DeviceRef, Graph, Module, TensorType

from graphs.autoencoder_kl import encode
from graphs.denoiser import StepGraphs
from graphs.flux1 import Flux1Denoiser
from graphs.rotary import image_ids, rotary_table
from graphs.weights import WeightScope
from max_diffusion.checkpoint import ComponentWeights, find_model
from max_diffusion.components import autoencoder_config
from max_diffusion.core.buffers import to_device, to_numpy
from max_diffusion.execution.compiler import CompiledGraphs
from max_diffusion.execution.graph_library import GraphLibrary
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.models.flux1.config import flux1_config

if TYPE_CHECKING:
    from diffusers import FluxPipeline


@pytest.fixture(scope="module")
def models(flux_folder: Path) -> Iterator[dict[str, Model]]:
    folder, host = find_model(flux_folder), DeviceRef.CPU()
    config = autoencoder_config(folder.config("vae"))
    sizes = flux1_config(folder.config("transformer"))

    def build_encoder(module: Module) -> WeightScope:
        vae = WeightScope("vae", DType.float32, host, products=DType.float32)
        types = [TensorType(DType.float32, ("batch", "height_0", "width_0", 3), host)]
        for level in range(len(config.block_out_channels)):
            size = (f"height_{level}", f"width_{level}")
            types.append(TensorType(DType.int8, size, host))
        with Graph("encode", input_types=types, module=module) as graph:
            picture, *levels = (value.tensor for value in graph.inputs)
            graph.output(*encode(config, vae, picture, levels))
        return vae

    def build_half(module: Module) -> WeightScope:
        # As on a processor that multiplies no bfloat16: as the tests' graphs are.
        half = WeightScope("transformer", DType.bfloat16, host, products=DType.float32)
        denoiser = Flux1Denoiser(sizes, DType.bfloat16, host)
        StepGraphs(module, denoiser, half).add_full()
        return half

    modules = [
        GraphModule("encode", build_encoder, is_for_cpu=True),
        GraphModule("transformer.full", build_half, is_for_cpu=True),
    ]
    filled: dict[str, np.ndarray | Buffer] = {}
    for needs in (module.needs for module in modules):
        files = folder.weight_files(needs.prefix)
        loaded = ComponentWeights.from_files(needs.prefix, files).load(needs.slots)
        filled |= {f"{needs.prefix}.{key}": array for key, array in loaded.items()}
    library = GraphLibrary(CPU(), [TEST_GRAPHS / "bfloat16"])
    compiled = CompiledGraphs(InferenceSession(devices=[CPU()]), CPU(), library)
    compiled.add(modules, lambda: filled)
    yield dict(compiled.models)  # while the weights are alive


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (2, 12, 20)])
def test_encoder_equals_diffusers(
    models: dict[str, Model],
    reference: FluxPipeline,
    batch: int,
    height: int,
    width: int,
) -> None:
    rng = np.random.default_rng(height)
    picture = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    levels: list[np.ndarray] = [
        np.zeros((height >> i, width >> i), np.int8) for i in range(2)
    ]
    inputs = [to_device(array, CPU()) for array in (picture, *levels)]
    mean, log_variance = map(to_numpy, models["encode"].execute(*inputs))
    with torch.no_grad():
        wanted = reference.vae.encode(
            torch.from_numpy(picture).permute(0, 3, 1, 2)
        ).latent_dist
    for ours, theirs in ((mean, wanted.mean), (log_variance, wanted.logvar)):
        assert np.abs(ours - theirs.permute(0, 2, 3, 1).numpy()).max() < 1e-4


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
