"""Checkpoint files that do not fit: one clear line each, before anything compiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from folders import copy_folder
from single_files import (
    CLIP,
    NET,
    T5,
    WEIGHTS,
    Tensors,
    as_bfl,
    in_float8,
    prefixed,
    saved,
    saved_gguf,
    tensors_of,
)

from max_diffusion import MaxDiffusionError, ModelLoadError, RequestError, open_model
from max_diffusion.checkpoint.gguf_file import BlockTensor, read_gguf
from max_diffusion.cli.main import main

KINDS = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def bfl(flux_folder: Path) -> Tensors:
    """The folder's transformer by Black Forest Labs' names."""
    return as_bfl(tensors_of(flux_folder, "transformer"))


@pytest.fixture(scope="module")
def lean_folder(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder without its transformer's weights."""
    folder = copy_folder(flux_folder, tmp_path_factory.mktemp("lean") / "model")
    (folder / "transformer" / WEIGHTS).unlink()
    return folder


def _with(tensors: Tensors, name: str, tensor: torch.Tensor | None) -> Tensors:
    """A copy with one tensor replaced, or taken out."""
    changed = dict(tensors)
    if tensor is None:
        del changed[name]
    else:
        changed[name] = tensor
    return changed


def _marked(tensors: Tensors, layer: str, entry: object) -> Tensors:
    text = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    return _with(tensors, f"{layer}.comfy_quant", text)


def _text(path: Path, tensors: Tensors) -> Path:
    path.write_text("no weights here, but a page that says who may have them\n")
    return path


def _truncated(path: Path, tensors: Tensors) -> Path:
    saved(path, tensors)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def _truncated_gguf(path: Path, tensors: Tensors) -> Path:
    saved_gguf(path, tensors, KINDS.Q8_0)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def _cut_header(path: Path, tensors: Tensors) -> Path:
    saved_gguf(path, tensors, KINDS.Q8_0)
    path.write_bytes(path.read_bytes()[:700])
    return path


def _big_endian(path: Path, tensors: Tensors) -> Path:
    writer = gguf.GGUFWriter(path, "flux", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("w", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _of_kind(kind: int) -> Callable[[Path, Tensors], Path]:
    """A GGUF file in which a matrix is of another quantisation."""

    def make(path: Path, tensors: Tensors) -> Path:
        saved_gguf(path, {"w": torch.ones(1, 256)}, KINDS.Q8_0)
        content = path.read_bytes()
        place = content.index(b"\1\0\0\0\0\0\0\0w") + 9 + 4 + 2 * 8
        number = int.from_bytes(content[place : place + 4], "little")
        assert number == KINDS.Q8_0
        whole = content[:place] + kind.to_bytes(4, "little") + content[place + 4 :]
        path.write_bytes(whole)
        return path

    return make


def _same_name(path: Path, tensors: Tensors) -> Path:
    saved_gguf(path, {"w": torch.ones(4), "v": torch.ones(4)})
    length = (1).to_bytes(8, "little")
    path.write_bytes(path.read_bytes().replace(length + b"v", length + b"w"))
    return path


def _same_key(path: Path, tensors: Tensors) -> Path:
    saved_gguf(path, {"w": torch.ones(4)})
    content = path.read_bytes()
    # Magic, version and two counts; then the key, and how long and what its text is.
    size = 8 + len("general.architecture") + 4 + 8 + len("flux")
    twice = content[24 : 24 + size] * 2
    count = (2).to_bytes(8, "little")
    path.write_bytes(content[:16] + count + twice + content[24 + size :])
    return path


def _axes(path: Path, tensors: Tensors) -> Path:
    saved_gguf(path, {"w": torch.ones(4)})
    content = path.read_bytes()
    place = content.index(b"\1\0\0\0\0\0\0\0w") + 9
    path.write_bytes(content[:place] + b"\5" + content[place + 1 :])
    return path


def _other_architecture(path: Path, tensors: Tensors) -> Path:
    return saved_gguf(path, tensors, arch="sdxl")[0]


def _pickle(path: Path, tensors: Tensors) -> Path:
    torch.save(tensors, path)
    return path


def _folder(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    return path


def _lora(path: Path, tensors: Tensors) -> Path:
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    names = (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha")
    return saved(path, dict.fromkeys(names, torch.ones(4, 4)))


def _peft(path: Path, tensors: Tensors) -> Path:
    stem = "transformer.transformer_blocks.0.attn.to_q.lora_"
    return saved(path, {f"{stem}{side}.weight": torch.ones(4, 4) for side in "AB"})


def _unet(path: Path, tensors: Tensors) -> Path:
    names = ("input_blocks.4.1.proj_in.weight", "middle_block.1.norm.weight")
    others = ("conditioner.embedders.0.x", "first_stage_model.decoder.conv_in.weight")
    unet = dict.fromkeys((*(NET + name for name in names), *others), torch.ones(2, 2))
    return saved(path, unet)


def _encoder(path: Path, tensors: Tensors) -> Path:
    return saved(path, {f"{CLIP}text_model.final_layer_norm.bias": torch.ones(4)})


def _unknown_part(path: Path, tensors: Tensors) -> Path:
    whole = prefixed(NET, tensors)
    names = ("text_encoders.gemma.model.norm.weight", "audio_vae.x")
    return saved(path, {**whole, **dict.fromkeys(names, torch.ones(4))})


def _two_autoencoders(path: Path, tensors: Tensors) -> Path:
    names = ("vae.decoder.conv_in.bias", "first_stage_model.decoder.conv_in.bias")
    whole = prefixed(NET, tensors)
    return saved(path, {**whole, **dict.fromkeys(names, torch.ones(4))})


def _no_scale(path: Path, tensors: Tensors) -> Path:
    small = in_float8(tensors, "scale_weight")
    small = _with(small, "double_blocks.1.img_mlp.0.scale_weight", None)
    return saved(path, _with(small, "scaled_fp8", torch.ones(0)))


def _marked_without_scale(path: Path, tensors: Tensors) -> Path:
    small, layer = in_float8(tensors), "single_blocks.1.linear1"
    return saved(path, _marked(small, layer, {"format": "float8_e4m3fn"}))


def _other_format(path: Path, tensors: Tensors) -> Path:
    small, layer = in_float8(tensors, "weight_scale"), "single_blocks.1.linear1"
    return saved(path, _marked(small, layer, {"format": "nvfp4"}))


def _format_is_list(path: Path, tensors: Tensors) -> Path:
    small, layer = in_float8(tensors, "weight_scale"), "single_blocks.1.linear1"
    return saved(path, _marked(small, layer, {"format": ["float8_e4m3fn"]}))


def _layer_is_list(path: Path, tensors: Tensors) -> Path:
    layers = {"single_blocks.1.linear1": ["float8_e4m3fn"]}
    told = {"_quantization_metadata": json.dumps({"layers": layers})}
    return saved(path, in_float8(tensors, "weight_scale"), **told)


def _no_json(path: Path, tensors: Tensors) -> Path:
    told = {"_quantization_metadata": "{"}
    return saved(path, in_float8(tensors, "weight_scale"), **told)


def _integers(path: Path, tensors: Tensors) -> Path:
    name = "single_blocks.1.linear2.weight"
    whole = _with(tensors, name, torch.ones(48, 240, dtype=torch.int8))
    scale = name.replace("weight", "weight_scale")
    return saved(path, _with(whole, scale, torch.ones(1)))


def _blocks_of_scales(path: Path, tensors: Tensors) -> Path:
    small, name = in_float8(tensors), "single_blocks.1.linear2"
    return saved(path, _with(small, f"{name}.weight_scale", torch.ones(7, 3)))


def _missing_block(path: Path, tensors: Tensors) -> Path:
    kept = {n: t for n, t in tensors.items() if not n.startswith("double_blocks.1.")}
    return saved(path, kept)


def _one_block_more(path: Path, tensors: Tensors) -> Path:
    more = {
        name.replace("single_blocks.1.", "single_blocks.2."): tensor
        for name, tensor in tensors.items()
        if name.startswith("single_blocks.1.")
    }
    return saved(path, {**tensors, **more})


def _guidance(path: Path, tensors: Tensors) -> Path:
    return saved(path, _with(tensors, "guidance_in.in_layer.bias", torch.ones(48)))


def _wrong_shape(path: Path, tensors: Tensors) -> Path:
    return saved(path, _with(tensors, "img_in.weight", torch.ones(48, 384)))


def _not_fused(path: Path, tensors: Tensors) -> Path:
    name = "double_blocks.0.txt_attn.qkv.weight"
    return saved(path, _with(tensors, name, torch.ones(50, 48)))


def _lacking_vae(path: Path, tensors: Tensors) -> Path:
    whole = prefixed(NET, tensors)
    return saved(path, {**whole, "vae.decoder.mid.block_1.norm1.weight": torch.ones(4)})


def _no_t5(path: Path, tensors: Tensors) -> Path:
    whole = prefixed(NET, tensors)
    return saved(path, {**whole, f"{T5}shared.weight": torch.ones(9, 41)})


def _empty(path: Path, tensors: Tensors) -> Path:
    path.touch()
    return path


MISSING = Path("there/is/none.safetensors")
BAD: list[tuple[Callable[[Path, Tensors], Path], str]] = [
    (lambda path, _: MISSING, r"no file 'there/is/none.safetensors'; check the path"),
    (lambda path, _: Path("x" * 5000), r"no file 'x+"),
    (_folder, r"w is a folder; expected one file of weights, safetensors or GGUF"),
    (_empty, r"is neither a safetensors nor a GGUF file; check the path"),
    (_text, r"is neither a safetensors nor a GGUF file; check the path"),
    (_pickle, r"is a pickle, which is not read: .* save the weights as safetensors"),
    (_truncated, r"\d+ bytes expected from its header, got \d+; .* truncated"),
    (_truncated_gguf, r"\d+ bytes expected from its header, got \d+; .* truncated"),
    (_cut_header, r"its header goes on after its last byte; the file is truncated"),
    (_big_endian, r"expected GGUF of version 2 or 3, little endian, got version"),
    (_of_kind(KINDS.IQ2_XXS), r"w is of quantisation IQ2_XXS; .* Q4_0, .* Q6_K: take"),
    (_of_kind(999), r"w is of quantisation 999; those that are read are F32, "),
    (_same_name, r"w: the tensor w is there twice; the file is damaged: down"),
    (_same_key, r"w: its header says general.architecture twice; the file is dam"),
    (_axes, r"w: w has 5 axes of at most 4; the file is damaged: download it again"),
    (_other_architecture, r"is a GGUF of architecture 'sdxl'; expected 'flux'"),
    (_lora, r"holds an adapter \(LoRA\) \(lora_unet_.*; expected a FLUX.1 transformer"),
    (_peft, r"holds an adapter \(LoRA\) \(transformer.transformer_blocks.0.attn"),
    (_unet, r"holds a UNet, as of Stable Diffusion \(input_blocks.4.1.proj_in.w"),
    (_encoder, r"holds a text encoder \(text_encoders.clip_l.transformer.text_m"),
    (_unknown_part, r": \S+ and 1 more belong to no component that is known \(model"),
    (_two_autoencoders, r"w: vae. and first_stage_model. both hold the vae; take a"),
    (_no_scale, r"double_blocks.1.img_mlp.0.weight in float8 without a scale, though"),
    (_marked_without_scale, r"blocks.1.linear1.weight in float8 without a scale"),
    (_other_format, r"blocks.1.linear1 is quantised as nvfp4 in F8_E4M3; float8"),
    (_format_is_list, r"linear1 is quantised as \['float8_e4m3fn'\] in F8_E4M3; flo"),
    (_layer_is_list, r"linear1 is quantised as \['float8_e4m3fn'\] in F8_E4M3; floa"),
    (_no_json, r"what it says of its quantisation is no JSON object"),
    (_integers, r"single_blocks.1.linear2.weight is stored as I8 with a scale in F32"),
    (_blocks_of_scales, r"\(7, 3\) cannot be multiplied as values and scale"),
    (_missing_block, r"transformer of w: 32 weights missing: .* \(double_blocks.1.img"),
    (_one_block_more, r"transformer of w: \d+ weights unused: single_blocks.2.linear1"),
    (_guidance, r"unused: guidance_in.in_layer.bias; is the file of the same"),
    (_wrong_shape, r"expected \(48, 20\), got \(48, 384\) from img_in.weight"),
    (_not_fused, r"txt_attn.qkv.weight \(50, 48\) cannot be split 0:1:2 along axis 0"),
    (
        _lacking_vae,
        r"vae of w: 75 weights missing: .* \(vae.decoder.\S+ in the f",
    ),
    (_no_t5, r"text_encoder_2 of w: \d+ weights missing: encoder.block.0"),
]


@pytest.mark.parametrize(
    ("make", "problem"), BAD, ids=[make.__name__.strip("_<>") for make, _ in BAD]
)
def test_bad_files_are_one_clear_line(
    lean_folder: Path,
    bfl: Tensors,
    tmp_path: Path,
    make: Callable[[Path, Tensors], Path],
    problem: str,
) -> None:
    file = make(tmp_path / "w", bfl)
    with pytest.raises(ModelLoadError, match=problem) as caught:
        open_model(lean_folder, "cpu", transformer=file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\n\x1b[31mb", "x" * 20000])
@pytest.mark.parametrize("place", ["", NET, "beside"])
def test_any_name_is_shown_in_one_line_and_cut(
    lean_folder: Path, bfl: Tensors, tmp_path: Path, name: str, place: str
) -> None:
    whole = prefixed(NET, bfl) if place else bfl
    stranger = f"{place}{name}"
    file = saved(tmp_path / "w", {**whole, stranger: torch.ones(4)})
    with pytest.raises(ModelLoadError) as caught:
        open_model(lean_folder, "cpu", transformer=file)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 500
    assert r"a\n\x1b[31mb" in text or "x" * 90 in text


def test_numbers_that_are_none_are_told_of_a_quantised_file(
    lean_folder: Path, bfl: Tensors, tmp_path: Path
) -> None:
    path, _ = saved_gguf(tmp_path / "w", bfl, KINDS.Q8_0)
    tensor = "single_blocks.0.linear2.weight"
    stored = read_gguf(path).tensors[tensor]
    assert isinstance(stored, BlockTensor)
    content = bytearray(path.read_bytes())
    content[stored.offset : stored.offset + 2] = b"\xff\x7f"
    path.write_bytes(content)
    pipeline = open_model(lean_folder, "cpu", transformer=path)
    with pytest.raises(ModelLoadError, match=rf"NaN or infinity: .* \(from {tensor}"):
        pipeline.graphs.opened.load()


@pytest.mark.parametrize("given", ["", 3, b"x"])
def test_what_is_no_path_is_refused(lean_folder: Path, given: object) -> None:
    with pytest.raises(RequestError, match=r"transformer: expected the path of a file"):
        open_model(lean_folder, "cpu", transformer=given)  # type: ignore[arg-type]


def test_a_family_without_single_files_says_so(
    toy_folder: Path, bfl: Tensors, tmp_path: Path
) -> None:
    file = saved(tmp_path / "w", bfl)
    with pytest.raises(ModelLoadError, match="ToyPipeline reads none from a single"):
        open_model(toy_folder, "cpu", transformer=file)


def test_a_file_in_the_place_of_a_folder_is_told_where_it_goes(
    bfl: Tensors, tmp_path: Path
) -> None:
    file = saved(tmp_path / "w", bfl)
    with pytest.raises(MaxDiffusionError, match=r"is a file; .* --transformer\) b"):
        open_model(file, "cpu")


def test_the_command_line_ends_with_one_line(
    lean_folder: Path,
    bfl: Tensors,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = _lora(tmp_path / "w", bfl)
    arguments = [
        ["inspect", str(lean_folder)],
        ["generate", "a", "--model", str(lean_folder), "--output", str(file) + ".png"],
        ["compile", str(lean_folder), "--output", str(tmp_path)],
        ["compare", "a", "--model", str(lean_folder), "-o", str(tmp_path / "c")],
    ]
    for given in arguments:
        with pytest.raises(SystemExit) as ended:
            main([*given, "--transformer", str(file)])
        said = capsys.readouterr().err
        assert ended.value.code == 3, said
        assert said.count("\n") == 1
        assert "w holds an adapter (LoRA)" in said
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "--model", str(lean_folder), "--transformer", str(file)])
    assert ended.value.code == 2
    assert "--output: with --transformer it must be given" in capsys.readouterr().err
