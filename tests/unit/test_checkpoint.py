"""Model folders and weights: what is wrong is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import copy_folder
from max.driver import Buffer
from max.dtype import DType
from safetensors.torch import load_file, save_file

from graphs.weights import WeightSlot, WeightSpec
from max_diffusion import ModelLoadError, load_pipeline
from max_diffusion.buffers import to_numpy
from max_diffusion.checkpoint import ComponentWeights, ModelFolder, open_model

FLOATS = {
    torch.float32: DType.float32,
    torch.float16: DType.float16,
    torch.bfloat16: DType.bfloat16,
}


def values(array: np.ndarray | Buffer) -> np.ndarray:
    return to_numpy(array) if isinstance(array, Buffer) else array


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_cast_as_torch_casts(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(37, 5) * 3).to(stored)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    weights = ComponentWeights.from_files("t", [tmp_path / "model.safetensors"])
    spec = {"w": WeightSpec((37, 5), FLOATS[wanted])}
    assert weights.problems(spec) == []
    loaded = weights.load({"w": WeightSlot("w", (37, 5), FLOATS[wanted])})["w"]
    expected = tensor.to(wanted).float().numpy()
    assert np.array_equal(values(loaded).astype(np.float32), expected)


def test_equal_dtypes_are_mapped_not_copied(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    weights = ComponentWeights.from_files("t", [tmp_path / "model.safetensors"])
    loaded = weights.load({"w": WeightSlot("w", (4,), DType.float32)})["w"]
    assert not loaded.flags.owndata
    assert not loaded.flags.writeable


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(2),
        "b": torch.ones(3),
        "c": torch.ones(2, dtype=torch.int64),
    }
    tensors |= {f"x{i}": torch.ones(1) for i in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = ComponentWeights.from_files("vae", [tmp_path / "model.safetensors"])
    spec = WeightSpec((2,), DType.float32)
    problems = weights.problems({"a": spec, "b": spec, "c": spec, "d": spec}, ["x1*"])
    text = "; ".join(problems)
    assert "vae: 1 weights missing: d" in text
    assert "9 weights unused: x0, x2" in text
    assert "1 weights of the wrong shape: b (expected (2,), got (3,))" in text
    assert "1 weights of a dtype that cannot be cast: c (int64)" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, dtype: torch.dtype, bad: float
) -> None:
    tensor = torch.zeros(100)
    tensor[63] = bad
    save_file({"w": tensor.to(dtype)}, tmp_path / "model.safetensors")
    weights = ComponentWeights.from_files("t", [tmp_path / "model.safetensors"])
    with pytest.raises(ModelLoadError, match="1 weights hold NaN or infinity: w"):
        weights.load({"w": WeightSlot("w", (100,), DType.float32)})


def test_truncated_file_says_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(
        ModelLoadError, match=f"{len(whole)} bytes expected .* got {len(whole) - 8}"
    ):
        ComponentWeights.from_files("t", [path])
    path.write_bytes(whole + b"more")
    with pytest.raises(ModelLoadError, match=f"expected .* got {len(whole) + 4}"):
        ComponentWeights.from_files("t", [path])
    path.write_bytes(whole[:20])
    with pytest.raises(ModelLoadError, match="truncated or no safetensors file"):
        ComponentWeights.from_files("t", [path])


@pytest.mark.parametrize(
    ("start", "message"), [(0, "b overlaps"), (12, "b leaves a gap to")]
)
def test_tensors_that_do_not_follow_each_other(
    tmp_path: Path, start: int, message: str
) -> None:
    entry = {"dtype": "F32", "shape": [2]}
    header = json.dumps(
        {
            "a": entry | {"data_offsets": [0, 8]},
            "b": entry | {"data_offsets": [start, start + 8]},
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(start + 8))
    with pytest.raises(ModelLoadError, match=message):
        ComponentWeights.from_files("t", [path])


def test_sharded_and_variant_weights_are_found(
    flux_folder: Path, tmp_path: Path
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    source = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(source)
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"00001": names[:half], "00002": names[half:]}
    weight_map = {}
    for number, members in parts.items():
        shard = f"diffusion_pytorch_model-{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in members}, source.parent / shard)
        weight_map |= dict.fromkeys(members, shard)
    index = source.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    source.rename(source.with_name("diffusion_pytorch_model.fp16.safetensors"))
    files = ModelFolder.open(folder).weight_files("transformer")
    assert [file.name.split("-")[1] for file in files] == ["00001", "00002"]
    held = ComponentWeights.from_files("t", files).tensors
    assert sorted(held) == names
    fp16 = ModelFolder.open(folder, "fp16").weight_files("transformer")
    assert [file.name for file in fp16] == ["diffusion_pytorch_model.fp16.safetensors"]
    with pytest.raises(ModelLoadError, match=r"'bf16' is not there; .*\(none\), fp16"):
        ModelFolder.open(folder, "bf16").weight_files("transformer")
    files[1].unlink()
    with pytest.raises(ModelLoadError, match="names diffusion_pytorch_model-00002"):
        ModelFolder.open(folder).weight_files("transformer")


def damage_nothing_there(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def damage_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def damage_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "SanaPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))


def damage_vae_folder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def damage_vae_role(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (folder / "model_index.json").write_text(json.dumps(index))


def damage_to_pickle(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.bin"
    )


def damage_weights(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["x_embedder.bias"]
    tensors["proj_out.bias"] = torch.ones(3)
    save_file(tensors, path)


def damage_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["beyond"] = 5000
    path.write_text(json.dumps(content))


def damage_config(role: str, **values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / role / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, "no model_index.json"),
        (damage_index, "not readable as JSON"),
        (damage_class, "names 'SanaPipeline'; supported are FluxPipeline"),
        (damage_vae_folder, "the folder vae is missing"),
        (damage_vae_role, "lists no vae"),
        (damage_to_pickle, "only diffusion_pytorch_model.bin, a pickle"),
        (
            damage_config("transformer", num_layers="2"),
            "transformer: config.json's num_layers must be a whole number .* got '2'",
        ),
        (damage_config("transformer", axes_dims_rope=4), "must be a list, got 4"),
        (damage_config("vae", block_out_channels=[8, 0]), "whole number .* got 0"),
        (damage_config("vae", act_fn="relu"), "act_fn must be silu, got 'relu'"),
        (damage_config("vae", scaling_factor="1"), "must be a number, got '1'"),
        (damage_config("text_encoder", hidden_act=3), "must be text, got 3"),
        (damage_config("text_encoder", vocab_size=9), "wrong shape: .*embedding"),
        (damage_tokenizer, "tokenizer: its 5001 ids are more than the .* encoder"),
        (damage_weights, "1 weights missing: x_embedder.bias; .*wrong shape: proj_out"),
    ],
)
def test_damaged_folders_are_one_line_errors(
    flux_folder: Path, tmp_path: Path, damage: object, message: str
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_pipeline(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_neither_folder_nor_repository(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is no folder here and no hub repository"):
        open_model(str(tmp_path / "nothing" / "here" / "x"))


def test_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="hub could not be reached") as caught:
        open_model("nobody/no-such-model-here")
    assert "\n" not in str(caught.value)
