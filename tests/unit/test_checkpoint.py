"""Model folders and weights: what is wrong is said in one line."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import copy_folder
from max.driver import Buffer
from max.dtype import DType
from safetensors.torch import load_file, save_file

from graphs.weights import WeightSlot, WeightSpec
from max_diffusion import ModelLoadError, load_pipeline, open_model
from max_diffusion.checkpoint import ComponentWeights, ModelFolder, find_model
from max_diffusion.core.buffers import to_numpy
from max_diffusion.errors import MaxDiffusionError
from max_diffusion.pipelines.families import PIPELINES
from max_diffusion.pipelines.opening import open_folder

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
    assert isinstance(loaded, np.ndarray)
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
    weight_map: dict[str, str] = {}
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
            "transformer: config.json's num_layers must be a whole number, got '2'",
        ),
        (
            damage_config("transformer", num_layers=10**9),
            r"transformer: more than 1,432 weights by config.json, .* hold 108",
        ),
        (
            damage_config("text_encoder_2", num_layers=10**9),
            "text_encoder_2: more than",
        ),
        (
            damage_config("text_encoder", num_hidden_layers=10**9),
            "text_encoder: more than",
        ),
        (damage_config("vae", layers_per_block=10**9), "vae: more than"),
        (
            damage_config("transformer", quantization_config={"quant_method": "nf4"}),
            r"transformer: config.json has a quantization_config \(nf4\), and quant",
        ),
        (
            damage_config("transformer", axes_dims_rope=4),
            "must be a list of whole numbers, got 4",
        ),
        (
            damage_config("vae", block_out_channels=[8, 0]),
            r"must be above 0, got \[8, 0\]",
        ),
        (damage_config("vae", act_fn="relu"), "act_fn must be silu, got 'relu'"),
        (damage_config("vae", scaling_factor="1"), "must be a number, got '1'"),
        (damage_config("text_encoder", hidden_act=3), "must be text, got 3"),
        (damage_config("text_encoder", vocab_size=9), "wrong shape: .*embedding"),
        (damage_tokenizer, "tokenizer: its 5001 ids are more than the .* encoder"),
        (damage_weights, "1 weights missing: x_embedder.bias; .*wrong shape: proj_out"),
    ],
)
def test_damaged_folders_are_one_line_errors(
    flux_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        open_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and the bytes after it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_safetensors(path: Path, header: dict[str, Any], rest: bytes) -> None:
    """Without the padding that safetensors puts after a header; an odd length."""
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_that_lie_unaligned_are_read(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    path = tmp_path / "model.safetensors"
    tensor = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).to(stored)
    save_file({"a": tensor, "s": torch.tensor(2.5), "z": torch.zeros(0, 3)}, path)
    write_safetensors(path, *header_of(path))
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 2 == 1
    assert torch.equal(load_file(path)["a"], tensor)
    weights = ComponentWeights.from_files("t", [path])
    kind = FLOATS[wanted]
    loaded = weights.load(
        {
            "a": WeightSlot("a", (7, 6), kind),
            "half": WeightSlot("a", (7, 2), kind, columns=(3, 5)),
            "s": WeightSlot("s", (), DType.float32),
            "z": WeightSlot("z", (0, 3), DType.float32),
        }
    )
    expected = tensor.to(wanted).float().numpy()
    assert np.array_equal(values(loaded["a"]).astype(np.float32), expected)
    assert np.array_equal(values(loaded["half"]).astype(np.float32), expected[:, 3:5])
    assert loaded["s"] == np.float32(2.5)
    for array in loaded.values():
        assert isinstance(array, Buffer) or array.flags.aligned


def owner(array: np.ndarray | Buffer) -> np.ndarray:
    """The array that holds the memory, or that a mapped file does for."""
    assert isinstance(array, np.ndarray)
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_only_what_lies_unaligned_or_is_small_is_copied(tmp_path: Path) -> None:
    path, count = tmp_path / "model.safetensors", 1 << 18
    size = 4 * count
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [count], "data_offsets": [0, size]},
        "few": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [size + 8, size + 9]},
        "c": {
            "dtype": "F32",
            "shape": [count],
            "data_offsets": [size + 9, 2 * size + 9],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(0).standard_normal(count, np.float32)
    many, few = numbers.tobytes(), numbers[:2].tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + many + few + b"7" + many)
    weights = ComponentWeights.from_files("t", [path])
    slots = {
        name: WeightSlot(name, tuple(header[name]["shape"]), DType.float32)
        for name in ("a", "few", "c")
    }
    loaded = weights.load(slots)
    assert [owner(loaded[name]).flags.owndata for name in slots] == [False, True, True]
    for array in loaded.values():
        assert isinstance(array, np.ndarray)
        assert (array == numbers[: array.size]).all()
        assert not array.flags.writeable


def test_dtypes_that_are_not_known_matter_where_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(4), "encoder.x": torch.ones(2)}, path)
    header, rest = header_of(path)
    header["encoder.x"] |= {"dtype": "F4_OF_TOMORROW", "shape": [16]}
    write_safetensors(path, header, rest)
    weights = ComponentWeights.from_files("vae", [path])
    spec = WeightSpec((4,), DType.float32)
    assert weights.problems({"w": spec}, ["encoder.*"]) == []
    loaded = weights.load({"w": WeightSlot("w", (4,), DType.float32)})
    assert values(loaded["w"]).tolist() == [1, 1, 1, 1]
    used = {"w": spec, "encoder.x": WeightSpec((16,), DType.float32)}
    assert weights.problems(used) == [
        "vae: 1 weights of a dtype that cannot be cast: encoder.x (F4_OF_TOMORROW)"
    ]
    assert weights.problems({"w": spec}) == ["vae: 1 weights unused: encoder.x"]
    header["encoder.x"]["data_offsets"].reverse()
    write_safetensors(path, header, rest)
    with pytest.raises(ModelLoadError, match=r"entry for encoder\.x is malformed"):
        ComponentWeights.from_files("vae", [path])


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
        "tokenizer_2/spiece.model",
        "tokenizer/merges.txt",
    ],
)
def test_pointers_of_git_lfs_are_told_as_that(
    flux_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    path = folder / name
    if path.suffix in (".model", ".txt"):
        (path.parent / "tokenizer.json").unlink()
        (path.parent / "vocab.json").write_text("{}")
    oid = "0" * 64
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 42\n"
    )
    with pytest.raises(ModelLoadError) as caught:
        open_model(folder, device="cpu")
    assert str(caught.value) == (
        f"{path.parent.name}/{path.name}: expected the file, got Git LFS's pointer to "
        "it; run `git lfs pull` in the model's folder, or download the model again"
    )


@pytest.mark.parametrize(
    "length", [2**63, 2**64 - 1, 10**6], ids=["negative as signed", "most", "beyond"]
)
def test_a_header_beyond_the_file_is_one_line(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelLoadError) as caught:
        ComponentWeights.from_files("t", [path])
    assert str(caught.value) == (
        f"{tmp_path.name}/model.safetensors: the header should end at byte "
        f"{8 + length}, the file at 10; it is truncated or no safetensors file: "
        "download it again"
    )


def resave(folder: Path, class_name: str, **entries: object) -> Path:
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {"_class_name": class_name} | entries
    path.write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_folders_of_other_tasks_with_the_same_parts_are_opened(
    flux_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    import diffusers

    parts = [
        set(inspect.signature(getattr(diffusers, kind).__init__).parameters)
        for kind in ("FluxPipeline", name)
    ]
    assert parts[0] == parts[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        saved = getattr(diffusers, name).from_pretrained(flux_folder)
        saved.save_pretrained(tmp_path / "model")
    caplog.clear()
    caplog.set_level(logging.INFO, "max_diffusion")
    folder, kind = open_folder(tmp_path / "model")
    assert kind.__name__ == "Flux1Pipeline"
    assert len(kind.component_configs(folder)) == 5
    assert caplog.messages == [f"model: saved by {name}; loaded for text to image"]


@pytest.mark.parametrize(
    "name",
    [
        "FluxKontextInpaintPipeline",
        "FluxControlPipeline",
        "FluxControlNetPipeline",
        "FluxPriorReduxPipeline",
        "Flux2KleinKVPipeline",
    ],
)
def test_folders_of_other_parts_are_refused_by_name(
    flux_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = resave(copy_folder(flux_folder, tmp_path / "model"), name)
    with pytest.raises(ModelLoadError) as caught:
        open_folder(folder)
    assert str(caught.value) == (
        f"model: model_index.json names {name!r}; supported are {', '.join(PIPELINES)}"
        "; others are made known by register_model, on the command line by --plugin"
    )


def test_parts_listed_as_null(flux_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    nothing = [None, None]
    resave(folder, "FluxPipeline", image_encoder=nothing, feature_extractor=nothing)
    opened, kind = open_folder(folder)
    assert len(kind.component_configs(opened)) == 5
    resave(folder, "FluxPipeline", text_encoder_2=nothing)
    with pytest.raises(ModelLoadError, match="lists text_encoder_2 as null, so the mo"):
        open_model(folder, device="cpu")
    resave(folder, "FluxPipeline", text_encoder_2="T5EncoderModel")
    with pytest.raises(ModelLoadError, match="lists no text_encoder_2; the model is"):
        open_model(folder, device="cpu")


def test_paths_are_never_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(*args: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", look_up)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look_up)
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/flux").write_text("a file")
    Path("models/lost").symlink_to("nothing")
    is_file = "is a file; expected a folder in the diffusers layout, with a model_index"
    is_none = "is no folder here and no hub repository (owner/name); check the path"
    for name, message in {
        "models/flux": is_file,
        str(tmp_path / "models/flux"): is_file,
        "models/lost": "is a link to nothing; expected a folder",
        "./model/x": is_none,
        "./x": is_none,
        "../x": is_none,
        "~/x": is_none,
        str(tmp_path / "x"): is_none,
        "/x": is_none,
        "models/flux/x": is_none,
        "x": is_none,
        "": is_none,
        "a/" + "x" * 300 + "/": is_none,
        "a\0b/c": is_none,
    }.items():
        with pytest.raises(ModelLoadError) as caught:
            find_model(name)
        assert message in str(caught.value)
    with pytest.raises(ModelLoadError, match=r"models: no model_index\.json"):
        find_model("models")
    with pytest.raises(ModelLoadError, match="models is a folder here, and revision"):
        find_model("models", revision="v1")


def test_messages_name_a_folder_that_is_given_as_a_dot(
    flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(resave(copy_folder(flux_folder, tmp_path / "model"), "Other"))
    with pytest.raises(ModelLoadError, match=r"^/.*/model: model_index\.json names 'O"):
        open_folder(".")


def test_neither_folder_nor_repository(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is no folder here and no hub repository"):
        find_model(str(tmp_path / "nothing" / "here" / "x"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path_or_repo_id": None}, "model: expected a name, a folder or a repos"),
        ({"path_or_repo_id": 5}, "model: expected a name, .* got 5"),
        ({"device": 5}, "device: expected auto, cpu, gpu or gpu:INDEX, got 5"),
        ({"device": None}, "device: expected auto, .* got None"),
        ({"calibration": 5}, "calibration: expected a file, or what one holds, got 5"),
    ],
)
def test_what_is_of_another_type_is_one_line(given: Any, message: str) -> None:
    with pytest.raises(MaxDiffusionError, match=message) as caught:
        load_pipeline(**({"path_or_repo_id": "demo", "device": "cpu"} | given))
    assert "\n" not in str(caught.value)


def test_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="hub could not be reached") as caught:
        find_model("nobody/no-such-model-here")
    assert "\n" not in str(caught.value)
