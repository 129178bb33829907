"""Folders with several sets of weights: the one that diffusers takes is taken."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import copy_folder
from safetensors.torch import load_file, save_file

from max_diffusion import ModelLoadError
from max_diffusion.checkpoint import ComponentWeights, ModelFolder

STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
PLAIN = {role: [f"{stem}.safetensors"] for role, stem in STEMS.items()}
FP16 = {role: [f"{stem}.fp16.safetensors"] for role, stem in STEMS.items()}


def whole(folder: Path, role: str) -> Path:
    return folder / role / f"{STEMS[role]}.safetensors"


def add_variant(folder: Path, role: str, factor: float = 0.5) -> None:
    """A variant fp16 whose values differ from the plain ones, so that they tell."""
    tensors = {k: v * factor for k, v in load_file(whole(folder, role)).items()}
    path = folder / role / f"{STEMS[role]}.fp16.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})


def add_shards(
    folder: Path, role: str, shard: str, index: str | None, factor: float = 0.25
) -> list[str]:
    """A sharded set; ``shard`` and ``index`` are names without the stem."""
    tensors = {k: v * factor for k, v in load_file(whole(folder, role)).items()}
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    files: list[str] = []
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = STEMS[role] + shard.format(f"0000{number}-of-00002")
        save_file(
            {name: tensors[name] for name in part},
            folder / role / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
        files.append(file)
    if index is not None:
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / role / (STEMS[role] + index)).write_text(json.dumps(content))
    return files


def plain_shards_gone(folder: Path) -> Mapping[str, list[str]]:
    """What a download of one variant leaves: the indexes of all."""
    for role in STEMS:
        add_variant(folder, role)
        for name in add_shards(
            folder, role, "-{}.safetensors", ".safetensors.index.json"
        ):
            (folder / role / name).unlink()
        whole(folder, role).unlink()
    return FP16


def variant_of_some(folder: Path) -> Mapping[str, list[str]]:
    for role in ("transformer", "text_encoder_2"):
        add_variant(folder, role)
    return PLAIN | {role: FP16[role] for role in ("transformer", "text_encoder_2")}


def other_variants_index(folder: Path) -> Mapping[str, list[str]]:
    for role in STEMS:
        index = f"{STEMS[role]}.safetensors.index.bf16.json"
        (folder / role / index).write_text('{"weight_map": {"x": "nothing"}}')
        (folder / role / f"{STEMS[role]}.safetensors.fp8.index.json").write_text("{")
    return PLAIN


def sharded_variant(folder: Path) -> Mapping[str, list[str]]:
    names = (".fp16-{}.safetensors", ".safetensors.index.fp16.json")
    return {role: add_shards(folder, role, *names) for role in STEMS}


def older_sharded_variant(folder: Path) -> Mapping[str, list[str]]:
    # transformers has never read the older name of an index.
    indexes = {"diffusion_pytorch_model": ".fp16.index", "model": ".index.fp16"}
    return {
        role: add_shards(
            folder, role, "-{}.fp16.safetensors", f".safetensors{indexes[stem]}.json"
        )
        for role, stem in STEMS.items()
    }


def file_and_index(folder: Path) -> Mapping[str, list[str]]:
    """Both there: diffusers takes the index, transformers the file."""
    shards = {
        role: add_shards(folder, role, "-{}.safetensors", ".safetensors.index.json")
        for role in STEMS
    }
    return PLAIN | {role: shards[role] for role in ("transformer", "vae")}


def stale_index_of_a_variant(folder: Path) -> Mapping[str, list[str]]:
    """The plain set is sharded, and the variant's index has none of its shards."""
    expected = {
        role: add_shards(folder, role, "-{}.safetensors", ".safetensors.index.json")
        for role in STEMS
    }
    for role in STEMS:
        whole(folder, role).unlink()
        index = f"{STEMS[role]}.safetensors.index.fp16.json"
        (folder / role / index).write_text('{"weight_map": {"x": "gone.safetensors"}}')
    return expected


def other_libraries_stem(folder: Path) -> Mapping[str, list[str]]:
    """Files that are named as the other library's are not read."""
    for role, stem in STEMS.items():
        other = "model" if stem != "model" else "diffusion_pytorch_model"
        (folder / role / f"{other}.safetensors").write_bytes(b"of something else")
        (folder / role / "ema.safetensors").write_bytes(b"of something else")
    return PLAIN


CASES = [
    (plain_shards_gone, "fp16"),
    (variant_of_some, "fp16"),
    (variant_of_some, None),
    (other_variants_index, None),
    (sharded_variant, "fp16"),
    (sharded_variant, None),
    (older_sharded_variant, "fp16"),
    (file_and_index, None),
    (stale_index_of_a_variant, None),
    (other_libraries_stem, None),
]


@pytest.mark.parametrize(("make", "variant"), CASES)
def test_the_set_that_diffusers_takes_is_taken(
    flux_folder: Path,
    tmp_path: Path,
    make: Callable[[Path], Mapping[str, list[str]]],
    variant: str | None,
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    expected = make(folder)
    if variant is None and make in (variant_of_some, sharded_variant):
        expected = PLAIN
    opened = ModelFolder.open(folder, variant)
    files = {role: opened.weight_files(role) for role in STEMS}
    assert {k: [p.name for p in v] for k, v in files.items()} == expected
    reference = from_diffusers(folder, variant)
    for role in STEMS:
        ours = ComponentWeights.from_files(role, files[role]).tensors
        theirs = getattr(reference, role).state_dict()
        shared = ours.keys() & {name for name in theirs if theirs[name].ndim}
        assert len(shared) > 10
        for name in shared:
            assert np.array_equal(ours[name].read(), theirs[name].numpy())


def from_diffusers(folder: Path, variant: str | None) -> Any:
    from diffusers import FluxPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        return FluxPipeline.from_pretrained(
            folder, variant=variant, torch_dtype=torch.float32
        )


def test_weights_that_were_not_asked_for_are_told(
    flux_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "max_diffusion")
    folder = copy_folder(flux_folder, tmp_path / "model")
    add_variant(folder, "vae")
    for variant, expected in ((None, PLAIN), ("fp16", PLAIN | {"vae": FP16["vae"]})):
        opened = ModelFolder.open(folder, variant)
        for role in ("vae", "transformer"):
            assert [x.name for x in opened.weight_files(role)] == expected[role]
    assert caplog.messages == [
        "model/transformer: no fp16 weights there, so diffusion_pytorch_model."
        "safetensors is used"
    ]
    # The only variant, where there are no plain weights.
    whole(folder, "vae").unlink()
    caplog.clear()
    files = ModelFolder.open(folder).weight_files("vae")
    assert [file.name for file in files] == FP16["vae"]
    assert caplog.messages == [
        f"model/vae: no plain weights there, so {files[0].name} is used"
    ]
    bf16 = folder / "vae" / "diffusion_pytorch_model.bf16.safetensors"
    bf16.write_bytes(b"")
    with pytest.raises(
        ModelLoadError, match=r"plain weights are not there; .* bf16, f"
    ):
        ModelFolder.open(folder).weight_files("vae")


INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"


def lone_shards(folder: Path) -> None:
    add_shards(folder, "vae", "-{}.safetensors", None)
    whole(folder, "vae").unlink()


def lone_shards_of_a_variant(folder: Path) -> None:
    add_shards(folder, "vae", "-{}.fp16.safetensors", None)
    whole(folder, "vae").unlink()


def index_of(name: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.dumps({"weight_map": {"x": name}})
        (folder / "vae" / INDEX).write_text(content)

    return damage


def index_of_nothing(folder: Path) -> None:
    (folder / "vae" / INDEX).write_text('{"weight_map": {}}')


def index_of_a_pointer(folder: Path) -> None:
    (folder / "vae" / INDEX).write_text("version https://git-lfs.github.com/spec/v1\n")


def index_beyond_its_shards(folder: Path) -> None:
    add_shards(folder, "vae", "-{}.safetensors", ".safetensors.index.json")
    path = folder / "vae" / INDEX
    content = json.loads(path.read_text())
    content["weight_map"] |= {"never.weight": SHARD}
    path.write_text(json.dumps(content))


def shard_missing(folder: Path) -> None:
    add_shards(folder, "vae", "-{}.safetensors", ".safetensors.index.json")
    (folder / "vae" / SHARD).unlink()


def empty(folder: Path) -> None:
    for path in (folder / "vae").iterdir():
        path.unlink()


def pickle_only(folder: Path) -> None:
    whole(folder, "vae").rename(folder / "vae" / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lone_shards,
            f"model/vae: {SHARD} is one of several shards, but their index {INDEX} is "
            "missing; download it too",
        ),
        (
            lone_shards_of_a_variant,
            "model/vae: diffusion_pytorch_model-00001-of-00002.fp16.safetensors is one "
            "of several shards, but their index diffusion_pytorch_model.safetensors."
            "index.fp16.json is missing; download it too",
        ),
        *(
            (
                index_of(name),
                f"vae/{INDEX}: weight_map must name safetensors files of this folder, "
                f"got {name!r}; download it again",
            )
            for name in (
                "../text_encoder/model.safetensors",
                "/etc/model.safetensors",
                "a\nb.safetensors",
                "config.json",
                "..",
                "",
                3,
            )
        ),
        (
            index_of_nothing,
            f"vae/{INDEX}: no weight_map from weights to files; download it again",
        ),
        (
            index_of_a_pointer,
            f"vae/{INDEX}: expected the file, got Git LFS's pointer to it; run `git "
            "lfs pull` in the model's folder, or download the model again",
        ),
        (
            index_beyond_its_shards,
            f"vae/{INDEX}: lists never.weight, which none of its shards holds; "
            "download the model again",
        ),
        (
            shard_missing,
            f"vae/{INDEX}: names {SHARD}, not in the folder; download the model again",
        ),
        (
            empty,
            "model/vae: no safetensors weights; the model is incomplete: download it "
            "again",
        ),
        (
            pickle_only,
            "model/vae: no safetensors weights; only diffusion_pytorch_model.bin, a "
            "pickle, which is not read: save the model again with "
            "safe_serialization=True",
        ),
    ],
)
def test_a_set_that_is_not_whole_is_one_line(
    flux_folder: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        ModelFolder.open(folder).weight_files("vae")


def test_a_tensor_in_two_shards_is_an_error(flux_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    names = add_shards(folder, "vae", "-{}.safetensors", ".safetensors.index.json")
    first, second = (folder / "vae" / name for name in names)
    tensors = load_file(first)
    save_file(tensors | load_file(second), second)
    files = ModelFolder.open(folder).weight_files("vae")
    message = f"{min(tensors)} is in {first.name} and in {second.name}; remove the file"
    with pytest.raises(ModelLoadError, match=re.escape(message)):
        ComponentWeights.from_files("vae", files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("name", ["vae", "vae/config.json", "model_index.json"])
def test_what_cannot_be_read_is_one_line(
    flux_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    (folder / name).chmod(0)
    try:
        with pytest.raises(ModelLoadError, match=r"cannot be read \(Permission denied"):
            ModelFolder.open(folder).config("vae")
    finally:
        (folder / name).chmod(0o700)
