"""Checkpoint files of other programs against the programs that they are for."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from max.dtype import DType
from single_files import (
    NET,
    Tensors,
    as_bfl,
    as_ldm,
    in_float8,
    prefixed,
    saved,
    saved_gguf,
)

from max_diffusion import ModelLoadError
from max_diffusion.checkpoint import (
    AbstractStoredTensor,
    AbstractTensor,
    CheckpointFile,
    ComponentWeights,
)
from max_diffusion.checkpoint.computed import to_float32
from max_diffusion.models.flux1.files import flux1_parts

KINDS = gguf.GGMLQuantizationType
BLOCKS = (
    *(KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1, KINDS.Q8_0),
    *(KINDS.Q2_K, KINDS.Q3_K, KINDS.Q4_K, KINDS.Q5_K, KINDS.Q6_K),
)
# Bytes of a block that hold float16 scales, which random bits would make infinite.
SCALES = {
    KINDS.Q4_0: (0,),
    KINDS.Q4_1: (0, 2),
    KINDS.Q5_0: (0,),
    KINDS.Q5_1: (0, 2),
    KINDS.Q8_0: (0,),
    KINDS.Q2_K: (80, 82),
    KINDS.Q3_K: (108,),
    KINDS.Q4_K: (0, 2),
    KINDS.Q5_K: (0, 2),
    KINDS.Q6_K: (208,),
}
# Of the width that diffusers' conversion knows; one column is enough to tell rows.
CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4,
    "pooled_projection_dim": 4,
    "axes_dims_rope": (16, 56, 56),
}


@pytest.fixture(scope="module", params=[False, True], ids=["schnell", "dev"])
def transformer(request: pytest.FixtureRequest) -> Tensors:
    """By Black Forest Labs' names."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**CONFIG, guidance_embeds=request.param)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    columns = {name: (s[0], 1)[: len(s)] for name, s in shapes.items()}
    return as_bfl({name: torch.randn(size) for name, size in columns.items()})


def converted(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """What diffusers makes of it."""
    found: Tensors = convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    return found


def read(path: Path) -> ComponentWeights:
    """The transformer of a file."""
    file = CheckpointFile.open(path, "transformer")
    transform = flux1_parts(file)["transformer"]
    return transform(CONFIG, file.weights_of("transformer"))


def numbers(tensor: AbstractTensor) -> np.ndarray:
    assert tensor.dtype is not None
    return to_float32(tensor.read(), tensor.dtype)


def assert_same(weights: ComponentWeights, wanted: Tensors) -> None:
    assert wanted
    assert weights.names == wanted.keys()
    used: set[AbstractStoredTensor] = set()
    for name, tensor in wanted.items():
        own = weights[name]
        used.update(own.stored)
        assert own.shape == tuple(tensor.shape), name
        assert np.array_equal(numbers(own), tensor.float().numpy()), name
    # Nothing is left over.
    assert used == set(weights.tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", NET])
@pytest.mark.parametrize("is_newer", [False, True])
def test_names_of_black_forest_labs_and_comfyui(
    transformer: Tensors, tmp_path: Path, prefix: str, dtype: Any, is_newer: bool
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in transformer.items()}
    wanted = converted(tensors)
    if is_newer:
        tensors = {
            name.replace("_norm.scale", "_norm.weight"): tensor
            for name, tensor in tensors.items()
        }
    weights = read(saved(tmp_path / "flux", prefixed(prefix, tensors)))
    assert_same(weights, wanted)


@pytest.mark.parametrize("prefix", ["", NET])
def test_diffusers_own_names(transformer: Tensors, tmp_path: Path, prefix: str) -> None:
    wanted = converted(transformer)
    assert_same(read(saved(tmp_path / "flux", prefixed(prefix, wanted))), wanted)


@pytest.mark.parametrize("has_names_of_diffusers", [False, True])
def test_float8_as_numbers(
    transformer: Tensors, tmp_path: Path, has_names_of_diffusers: bool
) -> None:
    tensors = converted(transformer) if has_names_of_diffusers else transformer
    small = in_float8(tensors)
    wanted = {name: tensor.float() for name, tensor in small.items()}
    if not has_names_of_diffusers:
        wanted = converted(wanted)
    assert_same(read(saved(tmp_path / "flux", prefixed(NET, small))), wanted)


def scaled(tensors: Tensors, scale_name: str) -> Tensors:
    """What torch makes of matrices with their scales."""
    return {
        name: tensor.float() * tensors[name.removesuffix("weight") + scale_name]
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith(scale_name)
    }


@pytest.mark.parametrize("prefix", ["", NET])
def test_scaled_float8_of_comfyui(
    transformer: Tensors, tmp_path: Path, prefix: str
) -> None:
    small = in_float8(transformer, "scale_weight")
    wanted = converted(scaled(small, "scale_weight"))
    inputs = {
        name.replace("scale_weight", "scale_input"): torch.rand(1)
        for name in small
        if name.endswith("scale_weight")
    }
    mark = torch.empty(2, dtype=torch.float8_e4m3fn)
    whole = prefixed(prefix, {**small, **inputs, "scaled_fp8": mark})
    assert_same(read(saved(tmp_path / "flux", whole)), wanted)


@pytest.mark.parametrize("is_in_header", [False, True])
def test_newer_scaled_float8_of_comfyui(
    transformer: Tensors, tmp_path: Path, is_in_header: bool
) -> None:
    small = in_float8(transformer, "weight_scale")
    wanted = converted(scaled(small, "weight_scale"))
    layers = [n.removesuffix(".weight_scale") for n in small if n.endswith("_scale")]
    told = {}
    entry = {"format": "float8_e4m3fn"}
    if is_in_header:
        marks = {f"{NET}{layer}": entry for layer in layers}
        quantised = {"format_version": "1.0", "layers": marks}
        told = {"_quantization_metadata": json.dumps(quantised)}
    else:
        text = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
        small |= {f"{layer}.comfy_quant": text.clone() for layer in layers}
    small |= {f"{layer}.input_scale": torch.rand(()) for layer in layers}
    path = saved(tmp_path / "flux", prefixed(NET, small), **told)
    assert_same(read(path), wanted)


def test_a_gguf_file_is_read_by_its_rows(transformer: Tensors, tmp_path: Path) -> None:
    path, meant = saved_gguf(tmp_path / "flux.gguf", transformer, KINDS.Q8_0)
    assert_same(read(path), converted(meant))


def random_blocks(kind: gguf.GGMLQuantizationType, count: int) -> np.ndarray:
    """Any bits, but for the scales; uint8 ``(count, bytes of a block)``."""
    rng = np.random.default_rng()
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    for place in SCALES[kind]:
        scale = rng.standard_normal(count).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8).reshape(count, 2)
    return blocks


def one_tensor(
    path: Path,
    stored: np.ndarray,
    kind: gguf.GGMLQuantizationType,
    shape: list[int] | None = None,
) -> AbstractTensor:
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("tokens", ["a", "bc"] * 20)  # what is passed over
    writer.add_array("numbers", list(range(100)))
    if shape:
        writer.add_array("comfy.gguf.orig_shape.w", shape)
    writer.add_tensor("other", np.ones((1, 3), np.float32))
    writer.add_tensor("w", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = CheckpointFile.open(path, "transformer")
    assert np.array_equal(file.tensors["other"].read(), np.ones((1, 3), np.float32))
    return file.tensors["w"]


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_each_quantisation_is_the_reference_s_to_the_bit(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, across = 23, 3
    stored = random_blocks(kind, rows * across).reshape(rows, across * size)
    wanted = gguf.quants.dequantize(stored, kind)
    assert np.isfinite(wanted).all()
    tensor = one_tensor(tmp_path / "w.gguf", stored, kind)
    assert tensor.shape == wanted.shape == (rows, across * block)
    assert tensor.dtype == DType.float32
    own = tensor.read()
    assert own.dtype == np.float32
    assert np.array_equal(own.view(np.uint32), wanted.view(np.uint32))
    # A part of the rows, of these again, and columns.
    part = tensor.sliced(0, 5, 21)
    assert np.array_equal(part.read(), wanted[5:21])
    assert np.array_equal(part.sliced(0, 2, 4).read(), wanted[7:9])
    assert np.array_equal(part.sliced(1, 7, 40).read(), wanted[5:21, 7:40])
    assert np.array_equal(tensor.sliced(1, 3, 89).read(), wanted[:, 3:89])
    assert part.stored == (tensor,)


@pytest.mark.parametrize("kind", [KINDS.Q5_1, KINDS.Q6_K], ids=lambda kind: kind.name)
def test_more_blocks_than_are_dequantised_at_once(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, across = 2101, 1024 // block
    stored = random_blocks(kind, rows * across).reshape(rows, across * size)
    tensor = one_tensor(tmp_path / "w.gguf", stored, kind)
    assert np.array_equal(tensor.read(), gguf.quants.dequantize(stored, kind))


def test_a_flattened_tensor_has_its_own_shape(tmp_path: Path) -> None:
    kind = KINDS.Q4_K
    stored = random_blocks(kind, 9)
    tensor = one_tensor(tmp_path / "w.gguf", stored, kind, shape=[48, 48])
    wanted = gguf.quants.dequantize(stored, kind).reshape(48, 48)
    assert np.array_equal(tensor.read(), wanted)
    # Rows that begin within a block.
    assert np.array_equal(tensor.sliced(0, 1, 17).read(), wanted[1:17])


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16])
def test_plain_tensors_of_a_gguf_file(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    array = np.random.default_rng().standard_normal((7, 5)).astype(np.float32)
    stored = gguf.quants.quantize(array, kind)
    tensor = one_tensor(tmp_path / "w.gguf", stored, kind)
    assert np.array_equal(numbers(tensor), gguf.quants.dequantize(stored, kind))


@pytest.mark.parametrize("has_attention", [False, True])
def test_an_autoencoder_by_the_names_of_latent_diffusion(
    tmp_path: Path, has_attention: bool
) -> None:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 12),
        layers_per_block=2,
        latent_channels=5,
        norm_num_groups=2,
        mid_block_add_attention=has_attention,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    config: dict[str, Any] = dict(model.config)
    ldm = as_ldm(model.state_dict(), 3)
    assert any(t.shape[2:] == (1, 1) for n, t in ldm.items() if "attn_1" in n) == (
        has_attention
    )
    wanted = convert_ldm_vae_checkpoint(dict(ldm), config)
    assert wanted.keys() == model.state_dict().keys()
    flux = {f"{NET}double_blocks.0.img_mod.lin.bias": torch.ones(1)}
    path = saved(tmp_path / "all", {**flux, **prefixed("vae.", ldm)})
    file = CheckpointFile.open(path, "transformer")
    weights = flux1_parts(file)["vae"](config, file.weights_of("vae"))
    for name, tensor in wanted.items():
        own = weights[name]
        assert own.shape == tuple(tensor.shape), name
        assert np.array_equal(own.read(), tensor.numpy()), name


def test_no_configuration_makes_it_look_for_a_billion_blocks(tmp_path: Path) -> None:
    tensors = {"double_blocks.0.img_mod.lin.bias": torch.ones(1)}
    file = CheckpointFile.open(saved(tmp_path / "f", tensors), "transformer")
    config = {**CONFIG, "num_layers": 10**9}
    weights = flux1_parts(file)["transformer"](config, file.weights_of("transformer"))
    with pytest.raises(ModelLoadError, match=r"transformer_blocks\.77\.attn"):
        weights["transformer_blocks.77.attn.to_q.weight"]


def test_little_more_than_the_result_is_held(tmp_path: Path) -> None:
    kind = KINDS.Q4_K
    stored = random_blocks(kind, 4 * 4096).reshape(1024, -1)
    tensor = one_tensor(tmp_path / "w.gguf", stored, kind)
    tracemalloc.start()
    size = tensor.read().nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 16 << 20
    assert peak < size + (10 << 20)
