"""Qwen-Image folders that are refused, and graphs that are built but not compiled."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cross_compile
import processes
import pytest
from folders import copy_folder

from max_diffusion import ModelLoadError, open_model


def rewrite(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("component", "settings", "message"),
    [
        ("transformer", {"zero_cond_t": True}, "zero_cond_t must be false .* editing"),
        ("transformer", {"use_layer3d_rope": True}, "use_layer3d_rope must be false"),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds must be false"),
        ("transformer", {"joint_attention_dim": 41}, "are they of one model"),
        ("transformer", {"out_channels": 4}, "takes 12 channels and gives 16"),
        ("transformer", {"axes_dims_rope": [4, 4, 4]}, "must add up to .* 16"),
        ("vae", {"attn_scales": [1.0]}, "attn_scales must be empty"),
        ("vae", {"input_channels": 4}, "input_channels must be 3, got 4"),
        ("vae", {"latents_std": [1.0]}, "z_dim = 3 values each, got 3 and 1"),
        ("text_encoder", {"model_type": "t5"}, "model_type must be .* got 't5'"),
        ("text_encoder", {"text_config": {"use_sliding_window": True}}, "use_sliding"),
    ],
)
def test_configurations_of_other_models_are_refused(
    qwen_folder: Path,
    tmp_path: Path,
    component: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    folder = copy_folder(qwen_folder, tmp_path / "copy")
    path = folder / component / "config.json"
    for name, value in settings.items():
        if isinstance(value, dict):
            settings = {name: json.loads(path.read_text())[name] | value}
    rewrite(path, **settings)
    with pytest.raises(ModelLoadError, match=message) as caught:
        open_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
        "QwenImage21Pipeline",
    ],
)
def test_pipelines_for_other_tasks_are_refused_by_name(
    qwen_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_folder(qwen_folder, tmp_path / "copy")
    rewrite(folder / "model_index.json", _class_name=name)
    with pytest.raises(ModelLoadError, match=f"{name}.*supported are.*QwenImagePip"):
        open_model(folder, device="cpu")


def test_a_text_encoder_of_another_model_is_refused(
    qwen_folder: Path, flux_folder: Path, tmp_path: Path
) -> None:
    folder = copy_folder(qwen_folder, tmp_path / "copy")
    (folder / "text_encoder").rename(tmp_path / "old")
    copy_folder(flux_folder / "text_encoder", folder / "text_encoder")
    with pytest.raises(ModelLoadError, match="model_type must be qwen2 or") as caught:
        open_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(
    qwen_folder: Path, tmp_path: Path
) -> None:
    folder = copy_folder(qwen_folder, tmp_path / "copy")
    path = folder / "tokenizer" / "tokenizer_config.json"
    rewrite(path, additional_special_tokens=[f"<more {n}>" for n in range(20)])
    with pytest.raises(ModelLoadError, match=r"ids are more than the .* of the text"):
        open_model(folder, device="cpu")


def test_a_truncated_file_is_refused_before_anything_compiles(
    qwen_folder: Path, tmp_path: Path
) -> None:
    folder = copy_folder(qwen_folder, tmp_path / "copy")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="truncated"):
        open_model(folder, device="cpu")


def test_graphs_build_for_a_gpu(qwen_folder: Path) -> None:
    script = cross_compile.__file__
    done = processes.run(sys.executable, script, qwen_folder, "build")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
