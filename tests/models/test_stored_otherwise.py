"""A FLUX.1 folder whose transformer and decoder are stored otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from folders import copy_folder
from kernel_oracle import pack
from max.driver import CPU, Buffer
from max.dtype import DType
from safetensors.torch import load_file, save_file

from graphs.weights import WeightSlot
from max_diffusion import ModelLoadError, open_model
from max_diffusion.caches import GraphGroup
from max_diffusion.checkpoint import (
    AbstractTensor,
    ComponentWeights,
    ModelFolder,
    WeightTransform,
    joined,
)
from max_diffusion.core.buffers import to_numpy
from max_diffusion.models.flux1.pipeline import Flux1Pipeline
from max_diffusion.pipelines.inspection import inspect
from max_diffusion.pipelines.loading import (
    OpenedComponents,
    PipelineConfig,
    open_pipeline_components,
)

Tensors = dict[str, torch.Tensor]
NET, VAE = "model.diffusion_model.", "first_stage_model."
FUSED = (
    (r"transformer_blocks\.(\d+)\.attn\.", ("to_q", "to_k", "to_v"), "double.{}.qkv"),
    (
        r"transformer_blocks\.(\d+)\.attn\.",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "double.{}.text_qkv",
    ),
    (
        r"single_transformer_blocks\.(\d+)\.",
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "single.{}.linear1",
    ),
)
TURNED = re.compile(r"(.*\.net\.\d(?:\.proj)?)\.weight|(.*proj_out)\.weight")
SWAPPED = re.compile(r"norm_out\.linear\.(weight|bias)")


def place_of(name: str) -> tuple[str, int, tuple[int, ...]] | None:
    """The fused tensor that a tensor is in, its place, and all shares."""
    stem, _, kind = name.rpartition(".")
    for pattern, members, whole in FUSED:
        match = re.match(pattern, stem)
        if match and stem[match.end() :] in members:
            shares = tuple(4 if member == "proj_mlp" else 1 for member in members)
            index = members.index(stem[match.end() :])
            return f"{whole.format(match[1])}.{kind}", index, shares
    return None


def stored_otherwise(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Fused where there is a place for it, some transposed, one with halves swapped."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if place := place_of(name):
            parts.setdefault(place[0], {})[place[1]] = tensor
        elif TURNED.fullmatch(name):
            stored[f"turned.{name}"] = tensor.T.contiguous()
        elif SWAPPED.fullmatch(name):
            stored[name] = torch.cat(tensor.chunk(2)[::-1])
        else:
            stored[name] = tensor
    for name, members in parts.items():
        stored[name] = torch.cat([members[index] for index in sorted(members)])
    return stored


def recipe(files: ComponentWeights, name: str) -> AbstractTensor:
    """The way back."""
    if place := place_of(name):
        whole, index, shares = place
        return files[whole].split(*shares)[index]
    if TURNED.fullmatch(name):
        return files[f"turned.{name}"].transposed()
    if SWAPPED.fullmatch(name):
        return joined(files[name].split(1, 1)[::-1])
    return files[name]


def arranged(config: Mapping[str, Any], weights: ComponentWeights) -> ComponentWeights:
    """The transformer's, of a file with all components and quantised matrices in it."""
    assert config["num_layers"] == 2
    return weights.under(NET).dequantised("{}.scale".format).through(recipe)


OTHER: Mapping[str, WeightTransform] = {
    "transformer": arranged,
    "vae": lambda config, weights: weights.under(VAE),
}


@pytest.fixture(scope="module")
def other_folder(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both components' folders hold the same file."""
    folder = copy_folder(flux_folder, tmp_path_factory.mktemp("other") / "model")
    name = "diffusion_pytorch_model.safetensors"
    transformer = stored_otherwise(load_file(folder / "transformer" / name))
    everything = {NET + key: tensor for key, tensor in transformer.items()}
    for key, tensor in load_file(folder / "vae" / name).items():
        everything[VAE + key] = tensor
    for role in ("transformer", "vae"):
        save_file(everything, folder / role / name)
    return folder


def opened(
    path: Path, encoding: str, transforms: Mapping[str, WeightTransform] | None = None
) -> OpenedComponents:
    folder, kinds = ModelFolder.open(path), Flux1Pipeline.components or {}
    config = PipelineConfig(
        {role: folder.config(role) for role in kinds},
        encoding,
        weight_ignores=Flux1Pipeline.weight_ignores,
        weight_transforms=transforms,
    )
    files = [file for role in kinds for file in folder.weight_files(role)]
    groups = frozenset(get_args(GraphGroup))
    return open_pipeline_components("t", kinds, None, config, [CPU()], files, groups)


def rewritten(path: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def bits(array: np.ndarray | Buffer) -> np.ndarray:
    return to_numpy(array) if isinstance(array, Buffer) else array


@pytest.mark.parametrize("encoding", ["float32", "bfloat16"])
def test_arrays_are_those_of_the_plain_folder(
    flux_folder: Path, other_folder: Path, encoding: str
) -> None:
    before, after = opened(flux_folder, encoding), opened(other_folder, encoding, OTHER)
    plain, ours = before.load(), after.load()
    slots = {name: needs for name, (needs, _) in after.sources.items()}
    assert slots == {name: needs for name, (needs, _) in before.sources.items()}
    assert ours.keys() == plain.keys()
    assert any(slot.is_packed for slot in slots["transformer"].slots.values())
    for name, array in plain.items():
        assert ours[name].dtype == array.dtype
        assert np.array_equal(bits(ours[name]), bits(array)), name


def test_rows_of_fused_matrices_are_mapped(other_folder: Path) -> None:
    weights = opened(other_folder, "float32", OTHER).sources["transformer"][1]
    names = "transformer_blocks.0.attn.to_q.weight", "proj_out.weight"
    shapes = (48, 48), (20, 48)
    slots = {
        name: WeightSlot(name, shape, DType.float32)
        for name, shape in zip(names, shapes, strict=True)
    }
    query, turned = weights.load(slots).values()
    assert isinstance(query, np.ndarray)
    assert isinstance(turned, np.ndarray)
    assert not query.flags.writeable
    assert turned.flags.writeable


def test_a_family_says_how_its_files_are_read(
    flux_folder: Path, other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelLoadError, match=r"transformer: .* weights missing: "):
        open_model(other_folder, device="cpu")
    plain = inspect(flux_folder, device="cpu").components
    monkeypatch.setattr(Flux1Pipeline, "weight_transforms", OTHER)
    parts = inspect(other_folder, device="cpu").components
    assert parts["transformer"].used_bytes == plain["transformer"].used_bytes
    assert parts["vae"].used_bytes == plain["vae"].used_bytes


@pytest.fixture
def damaged(other_folder: Path, tmp_path: Path) -> Iterator[Path]:
    """The transformer's file of a copy."""
    folder = copy_folder(other_folder, tmp_path / "model")
    yield folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_every_problem_is_told_by_both_names(damaged: Path) -> None:
    def damage(tensors: Tensors) -> None:
        del tensors[f"{NET}double.1.qkv.bias"]
        tensors[f"{NET}single.0.linear1.weight"] = torch.ones(50, 48)
        tensors[f"{NET}turned.proj_out.weight"] = torch.ones(48, 21)
        tensors[f"{NET}extra"] = torch.ones(1)

    rewritten(damaged, damage)
    with pytest.raises(ModelLoadError) as caught:
        opened(damaged.parents[1], "float32", OTHER)
    whole = f"{NET}single.0.linear1.weight (50, 48) cannot be split 1:1:1:4 along"
    assert str(caught.value) == (
        "transformer: 3 weights missing: "
        + ", ".join(
            f"transformer_blocks.1.attn.to_{i}.bias ({NET}double.1.qkv.bias in the "
            "files)"
            for i in "qkv"
        )
        + f"; transformer: 1 weights unused: {NET}extra; "
        "transformer: 5 weights of the wrong shape: "
        + "".join(
            f"single_transformer_blocks.0.{part}.weight ({whole} axis 0), "
            for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        )
        + "proj_out.weight (expected "
        f"(20, 48), got (21, 48) from {NET}turned.proj_out.weight (48, 21))"
    )


def test_quantised_matrices_are_scaled_before_they_are_split(damaged: Path) -> None:
    wanted: Tensors = {}

    def damage(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(NET)]:
            if tensors[name].ndim == 2:
                scale = torch.rand(()) + 0.5
                small = (tensors[name] / scale).to(torch.float8_e4m3fn)
                tensors[name], tensors[f"{name}.scale"] = small, scale
                wanted[name] = small.float() * scale

    rewritten(damaged, damage)
    arrays = opened(damaged.parents[1], "float32", OTHER).load()
    stems = "to_q", "to_k", "to_v"
    names = [f"transformer_blocks.1.attn.{stem}.weight" for stem in stems]
    key = f"transformer.{'+'.join(names)}"
    matrix = wanted[f"{NET}double.1.qkv.weight"].numpy()
    assert np.array_equal(
        arrays[f"{key}.packed"], np.asarray(pack(matrix, DType.float32))
    )
    for name in ("proj_out.weight", "single_transformer_blocks.0.proj_out.weight"):
        turned = wanted[f"{NET}turned.{name}"].T.numpy()
        own = arrays[f"transformer.{name}.packed"]
        assert np.array_equal(own, np.asarray(pack(turned, DType.float32)))
