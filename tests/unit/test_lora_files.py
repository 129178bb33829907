"""LoRA files: names of every kind, settings beside them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from lora_files import Tensors
from max.dtype import DType

from graphs.weights import WeightSpec
from max_diffusion import ModelLoadError, RequestError, open_model
from max_diffusion.checkpoint.lora import Lora
from max_diffusion.checkpoint.lora_file import LoraFile
from max_diffusion.cli.main import main
from max_diffusion.core.loras import as_lora_files, as_loras, lora_from_text
from max_diffusion.models.flux1.lora_names import LORA_NAMES

WIDTH = 3072  # the only one at which diffusers splits Kohya's linear1


def flux_shapes(width: int, layers: int, single_layers: int) -> dict[str, Any]:
    """Shapes of a transformer's matrices as diffusers' own class has them."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=8,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=width // 24,
            num_attention_heads=24,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56) if width == WIDTH else (4, 2, 2),
        )
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if tensor.ndim == 2
    }


SMALL = flux_shapes(8 * 24, 1, 1)


def specs(shapes: dict[str, Any]) -> dict[str, WeightSpec]:
    return {f"{n}.weight": WeightSpec(s, DType.float32) for n, s in shapes.items()}


def opened(path: Path, shapes: dict[str, Any] = SMALL) -> Lora:
    return Lora.open(path, {"transformer": (LORA_NAMES["transformer"], specs(shapes))})


def changes(lora: Lora) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Factors of every change, the alpha in the first, by module."""
    adapter, found = lora.adapters["transformer"], {}
    for name in lora.changed["transformer"]:
        module = name.removesuffix(".weight")
        down, up, alpha = (
            torch.tensor(adapter[f"{module}.{half}"].read()).double()
            for half in ("lora_A.weight", "lora_B.weight", "alpha")
        )
        found[module] = (down * alpha / len(down), up)
    return found


@pytest.mark.parametrize("naming", ["kohya", "comfy-down", "xlabs"])
def test_names_are_those_that_diffusers_converts(naming: str, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    shapes = flux_shapes(WIDTH, 2, 3)
    tensors = lora_files.lora(naming, shapes, extras=True)
    lora = opened(lora_files.write(tmp_path / "x.safetensors", tensors), shapes)
    converted = FluxPipeline.lora_state_dict(dict(tensors))
    ours, seen = changes(lora), set()
    for name in converted:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            down, up = ours[module := stem.removeprefix("transformer.")]
            seen.add(module)
            x = torch.randn(down.shape[1], 2, dtype=torch.float64)
            theirs = converted[f"{stem}.lora_B.weight"].double()
            wanted = theirs @ (converted[name].double() @ x)
            if module in ("proj_out", "norm_out.linear"):  # it loses their alpha
                rank = len(down)
                wanted *= (rank + 1) / 2 / rank
            assert torch.allclose(up @ (down @ x), wanted, rtol=1e-5, atol=1e-4), name
    assert seen == ours.keys()


@pytest.mark.parametrize("has_rslora", [False, True])
def test_alphas_that_peft_keeps_beside_the_file(
    has_rslora: bool, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_out = torch.nn.Linear(6, 5)
            self.x_embedder = torch.nn.Linear(4, 6)

    model = get_peft_model(
        Net(),
        LoraConfig(
            r=4,
            lora_alpha=6,
            rank_pattern={"x_embedder": 2},
            alpha_pattern={"proj_out": 3},
            target_modules=["proj_out", "x_embedder"],
            init_lora_weights=False,
            use_rslora=has_rslora,
        ),
    )
    model.save_pretrained(str(tmp_path))
    lora = opened(tmp_path, {"proj_out": (5, 6), "x_embedder": (6, 4)})
    for module, (down, up) in changes(lora).items():
        layer = getattr(model.base_model.model, module)
        wanted = layer.get_delta_weight("default").detach().double()
        assert torch.allclose(up @ down, wanted, rtol=1e-6, atol=1e-7)


def test_alphas_in_the_header_as_diffusers_writes_them(tmp_path: Path) -> None:
    tensors = lora_files.lora("peft", SMALL)
    plain = {name: t for name, t in tensors.items() if "alpha" not in name}
    settings = {"transformer.r": 4, "transformer.lora_alpha": 10}
    settings["transformer.alpha_pattern"] = {"ff.net.2": 1.5}  # type: ignore[assignment]
    path = lora_files.write(
        tmp_path / "x.safetensors",
        plain,
        {"lora_adapter_metadata": json.dumps(settings)},
    )
    for stem, pair in LoraFile.read(path).pairs.items():
        assert pair.alpha == (1.5 if stem.endswith("ff.net.2") else 10)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_an_alpha_may_be_an_integer(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = lora_files.lora("peft", SMALL)
    tensors[f"{STEM}.alpha"] = torch.tensor(6, dtype=dtype)
    path = lora_files.write(tmp_path / "x.safetensors", tensors)
    assert LoraFile.read(path).pairs[STEM].alpha == 6


def test_other_spellings_of_halves_and_axes_of_one_element(tmp_path: Path) -> None:
    down, up = torch.randn(2, 8), torch.randn(192, 2)
    for index, (first, second) in enumerate(
        (
            (".lora.down.weight", ".lora.up.weight"),
            (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
            (".lora_A.default.weight", ".lora_B.default.weight"),
        )
    ):
        stem = "transformer.x_embedder"
        tensors = {
            stem + first: down[..., None, None],
            stem + second: up[..., None, None],
        }
        path = lora_files.write(tmp_path / f"{index}.safetensors", tensors)
        assert torch.allclose(
            torch.matmul(*changes(opened(path))["x_embedder"][::-1]).float(),
            up @ down,
            atol=1e-5,
        )


def test_what_was_opened_is_merged_though_the_file_be_replaced(tmp_path: Path) -> None:
    tensors = lora_files.lora("peft", SMALL)
    lora = opened(lora_files.write(tmp_path / "x.safetensors", tensors))
    before = changes(lora)
    other = {name: tensor + 1 for name, tensor in reversed(tensors.items())}
    lora_files.write(tmp_path / "y.safetensors", other).replace(lora.path)
    for module, pair in changes(lora).items():
        assert all(map(torch.equal, pair, before[module])), module


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(old, new): t for n, t in tensors.items()}


def with_one(end: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"{STEM}.{end}": tensor}


def first_half(tensors: Tensors) -> Tensors:
    return {n: t for n, t in tensors.items() if n != f"{STEM}.lora_B.weight"}


STEM = "transformer.transformer_blocks.0.attn.to_q"
NAN = torch.tensor([[1.0, float("nan")]]).repeat(1, 96)
BAD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "dora": (with_one("dora_scale", torch.ones(192)), r"it is DoRA, .*dora_scale"),
    "peft-dora": (
        with_one("lora_magnitude_vector", torch.ones(192)),
        r"it is DoRA, .*lora_magnitude_vector",
    ),
    "loha": (with_one("hada_w1_a", torch.ones(2, 2)), r"it is LoHa, "),
    "lokr": (with_one("lokr_w1", torch.ones(2, 2)), r"it is LoKr, "),
    "oft": (with_one("oft_blocks", torch.ones(2, 2)), r"it is OFT, "),
    "middle": (with_one("lora_mid.weight", torch.ones(2, 2)), r"middle matrix, "),
    "bias": (with_one("lora_B.bias", torch.ones(192)), r"LoRA with biases, "),
    "difference": (with_one("diff", torch.ones(192, 192)), r"whole differences, "),
    "nan": (with_one("lora_A.weight", NAN), r"1 tensors hold NaN or infinity: .*to_q"),
    "infinite alpha": (
        with_one("alpha", torch.tensor(float("inf"))),
        r"to_q.alpha must be one finite number",
    ),
    "alpha of two": (with_one("alpha", torch.ones(2)), r"must be one finite number"),
    "alpha of truth": (
        with_one("alpha", torch.tensor(True)),
        r"must be one finite number, got BOOL",
    ),
    **{
        code: (
            with_one("lora_A.weight", torch.ones(2, 192, dtype=dtype)),
            rf"a dtype that is not computed with: .*to_q.lora_A.weight \({code}\)",
        )
        for code, dtype in zip(
            ("I32", "I8", "U8"), (torch.int32, torch.int8, torch.uint8), strict=True
        )
    },
    "ranks": (
        with_one("lora_A.weight", torch.ones(7, 192)),
        r"1 modules of two ranks: .*to_q \(down \(7, 192\), up \(192, \d\)\)",
    ),
    "half": (first_half, r"1 without their other half: .*to_q.lora_A.weight"),
    "unknown": (
        with_one("lora_C.weight", torch.ones(1)),
        r"1 tensors are of no LoRA: .*to_q.lora_C.weight",
    ),
    "alpha of nothing": (
        lambda tensors: tensors | {"transformer.a.alpha": torch.ones(())},
        r"1 tensors are of no LoRA: transformer.a.alpha",
    ),
    "width": (
        with_one("lora_A.weight", torch.ones(2, 1536)),
        r"1 of \d+ modules are of another width: .*to_q \(changes \(192, 1536\), here "
        r"\(192, 192\)\)",
    ),
    "rows": (
        with_one("lora_B.weight", torch.ones(191, 2)),
        r"are of another width: .*to_q \(changes \(191, 192\), here \(192, 192\)\)",
    ),
    "stranger": (
        renamed("transformer_blocks.0.attn.to_q", "transformer_blocks.7.attn.to_q"),
        r"2 of \d+ modules match nothing in this model: .*blocks.7.attn.to_q",
    ),
    "of a UNet": (
        renamed("transformer.", "lora_unet_down_blocks_1_"),
        r"(?s)(\d+) of \1 modules match nothing.* and \d+ more; it is of a Stable "
        "Diffusion UNet; give one that was trained on this model",
    ),
    "twice": (
        lambda tensors: (
            tensors
            | {
                n.replace("transformer.", "", 1): t
                for n, t in tensors.items()
                if STEM in n
            }
        ),
        r"1 of \d+ modules change what another does: transformer_blocks.0.attn.to_q",
    ),
    "empty": (lambda tensors: {"x.alpha": torch.ones(())}, r"are of no LoRA: x.alpha"),
}


@pytest.mark.parametrize("name", ["a\n\x1b[31mb", "x" * 20000])
@pytest.mark.parametrize(
    "end",
    [".lora_C.weight", ".dora_scale", ".lora_A.weight", "LoRA", "LoRA of two ranks"],
)
def test_any_name_is_shown_in_one_line_and_cut(
    name: str, end: str, tmp_path: Path
) -> None:
    is_whole = end.startswith("LoRA")
    ends = [".lora_A.weight", ".lora_B.weight"] if is_whole else [end]
    size = 3 if "ranks" in end else 2
    halves = (torch.ones(size, 192), torch.ones(192, 2))
    tensors = lora_files.lora("peft", SMALL)
    tensors |= {name + e: half for e, half in zip(ends, halves, strict=False)}
    with pytest.raises(ModelLoadError) as caught:
        opened(lora_files.write(tmp_path / "x.safetensors", tensors))
    text = str(caught.value)
    assert text.isprintable() and len(text) < 500
    assert r"a\n\x1b[31mb" in text or "x" * 100 in text


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_one_line(kind: str, tmp_path: Path) -> None:
    damage, message = BAD[kind]
    tensors = lora_files.lora("peft", SMALL)
    tensors[f"{STEM}.lora_A.weight"] = torch.ones(2, 192)
    tensors[f"{STEM}.lora_B.weight"] = torch.ones(192, 2)
    if kind == "nan":
        tensors[f"{STEM}.lora_B.weight"] = torch.ones(192, 1)
    path = lora_files.write(tmp_path / "my" / "style.safetensors", damage(tensors))
    with pytest.raises(ModelLoadError, match=message) as caught:
        opened(path)
    assert str(caught.value).startswith("lora my/style.safetensors: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_safetensors_are_one_line(tmp_path: Path) -> None:
    good = lora_files.write(
        tmp_path / "good.safetensors", lora_files.lora("peft", SMALL)
    )
    short = tmp_path / "short.safetensors"
    short.write_bytes(good.read_bytes()[:-100])
    text = tmp_path / "text.safetensors"
    text.write_text("no such thing, but longer than a header is")
    pickle = tmp_path / "x.bin"
    pickle.write_bytes(b"\x80")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (short, "is truncated"),
        (text, "truncated or no safetensors file"),
        (pickle, r"got \.bin, a pickle, which is not read"),
        (tmp_path / "missing.safetensors", "cannot be read"),
        (tmp_path / "folder", "expected adapter_model.safetensors or pytorch_lora"),
    ):
        with pytest.raises(ModelLoadError, match=message) as caught:
            opened(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "its configuration says LOHA, "),
        ({"use_dora": True}, "its configuration says DoRA, "),
        ({"peft_type": "LO\nHA"}, r"says LO\\nHA, of which"),
        ({"use_dora": 1}, "use_dora must be true or false, got 1;"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false';"),
        ({"fan_in_fan_out": True}, "its configuration says fan_in_fan_out, "),
        ({"lora_bias": True}, "its configuration says lora_bias, "),
        ({"modules_to_save": ["a"]}, r"says modules_to_save \['a'\], of which"),
        ({"init_lora_weights": "pissa"}, "says init_lora_weights 'pissa', a ch"),
        ({"init_lora_weights": "pissa_niter_4"}, "weights 'pissa_niter_4', a ch"),
        ({"init_lora_weights": "OLoRA"}, "says init_lora_weights 'OLoRA', a ch"),
        ({"lora_alpha": "a"}, "lora_alpha must be a number that float32 .*, got 'a'"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number .*, got 1000"),
        ({"lora_alpha": 1e39}, r"lora_alpha must be a number .*, got 1e\+39;"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number .*, got nan;"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern must be alphas by patterns"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be alphas by patterns"),
    ],
)
def test_settings_that_are_wrong_are_one_line(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = {
        "base_model.model.proj_out.lora_A.weight": torch.ones(2, 192),
        "base_model.model.proj_out.lora_B.weight": torch.ones(8, 2),
    }
    lora_files.write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelLoadError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_that_change_nothing_are_taken(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out"), False),
        **{"lora_bias": None, "modules_to_save": [], "init_lora_weights": "gaussian"},
    }
    told = {f"transformer.{name}": value for name, value in settings.items()}
    path = lora_files.write(
        tmp_path / "x.safetensors",
        lora_files.lora("peft", SMALL),
        {"lora_adapter_metadata": json.dumps(told)},
    )
    assert STEM in LoraFile.read(path).pairs


def test_what_callers_give_in_any_form() -> None:
    assert as_loras("x", None) == ()
    assert as_loras("x", "a") == (("a", 1.0),)
    assert as_loras("x", Path("a")) == (("a", 1.0),)
    assert as_loras("x", ["a", ("b", 2)]) == (("a", 1.0), ("b", 2.0))
    assert as_loras("x", {"a": 0.5, "b": -1}) == (("a", 0.5), ("b", -1.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a", ("a", 0.5)], "x: 'a' is given twice"),
        ({"a": "much"}, "x: the weight of 'a' must be a finite number, got 'much'"),
        ({"a": float("nan")}, "must be a finite number, got nan"),
        ({"a": True}, "must be a finite number, got True"),
        ({"a": 1000}, "must be -100 to 100, got 1000"),
        ([("a", 1, 2)], "x: expected a name, or a name and its weight"),
        ([3], "x must be text, got int"),
        ([""], "a name is empty"),
        (3, "x: expected names, or weights by name, got 3"),
    ],
)
def test_what_callers_give_wrongly_is_one_line(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        as_loras("x", given)


def test_a_file_is_given_once_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").touch()
    Path("b").touch()
    Path("link").symlink_to("a")
    given = {"a": 1.0, "b": 0.5, "missing": 1.0, "./missing": 1.0, "nul\0": 1.0}
    assert as_lora_files("x", given) == as_loras("x", given)
    for other in ("./a", str(tmp_path / "a"), "link"):
        said = f"'a' and {other!r} are one file; give it once, with one weight"
        with pytest.raises(RequestError) as caught:
            open_model("demo", "cpu", loras={"a": 1.0, "b": 1.0, other: 0.5})
        assert str(caught.value) == f"loras: {said}"
        with pytest.raises(SystemExit):
            main(["generate", "x", "--lora", "a", "--lora", f"{other}:0.5"])
        assert capsys.readouterr().err == f"error: --lora: {said}\n"


def test_files_and_weights_of_the_command_line(tmp_path: Path) -> None:
    odd = tmp_path / "a:0.5"
    odd.touch()
    (tmp_path / "b").touch()
    assert lora_from_text("--lora", str(odd)) == (str(odd), 1.0)
    assert lora_from_text("--lora", f"{odd}:0.25") == (str(odd), 0.25)
    assert lora_from_text("--lora", f"{tmp_path}/b:-1") == (f"{tmp_path}/b", -1.0)
    assert lora_from_text("--lora", "c") == ("c", 1.0)
    for end, message in (
        ("much", "with a number, such as .*b:0.8, got 'much'"),
        ("nan", "must be a finite number, got nan"),
        ("101", "must be -100 to 100"),
    ):
        with pytest.raises(RequestError, match=message):
            lora_from_text("--lora", f"{tmp_path}/b:{end}")


@pytest.mark.parametrize("end", ["", ":0.5", ":x"])
def test_a_name_that_no_file_can_have_is_one_line(end: str) -> None:
    name = "x" * 5000 + end
    file, _ = lora_from_text("--lora", name)
    assert file in (name, "x" * 5000)
    with pytest.raises(
        ModelLoadError, match=r"cannot be read \(File name too long"
    ) as caught:
        LoraFile.read(Path(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
