"""Folders of released models' sizes, whose weights are holes in files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from cogvideox_folder import VARIANTS, make_cogvideox_folder
from flux2_dev_folder import make_flux2_dev_folder
from flux2_folder import make_flux2_folder
from folders import make_flux_folder
from qwen_folder import make_qwen_folder
from z_image_folder import make_z_image_folder

if TYPE_CHECKING:
    from transformers import Qwen3Config, T5Config

Models = dict[str, Any]
"""Models on torch's device without memory, by their roles."""


@dataclass(frozen=True)
class FullSize:
    """A released model."""

    make_small: Callable[[Path], Path]
    """Writes the small folder that lends its tokenizer and scheduler."""
    make_models: Callable[[int | None], Models]
    """Makes its models, with so many layers of the transformer if that is given."""
    tokens: tuple[int, int]
    """Image and text tokens of the default size, the most of the latter."""
    blocks: int
    """Blocks that a cache may skip."""
    width: int
    """Channels of a hidden state."""


def make_full_size_folder(path: Path, name: str, layers: int | None = None) -> Path:
    """Writes a released model's folder.

    Args:
        path: Folder that is made.
        name: Of :data:`FULL_SIZES`.
        layers: Layers of the transformer, if not all.
    """
    size = FULL_SIZES[name]
    small = size.make_small(path.parent / f"{path.name}-small")
    shutil.copytree(small, path)
    with torch.device("meta"):
        models = size.make_models(layers)
    for role, model in models.items():
        if hasattr(model, "save_config"):
            model.save_config(path / role)
        else:
            model.config.save_pretrained(path / role)
        _write_holes(next((path / role).glob("*.safetensors")), model)
    return path


def _write_holes(file: Path, model: torch.nn.Module) -> None:
    header, end = {}, 0
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    for name, value in model.state_dict().items():
        if name in tied:
            continue  # the same table as another's
        size = 2 * math.prod(value.shape)
        header[name] = {
            "dtype": "BF16",
            "shape": list(value.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    words = json.dumps(header).encode()
    with file.open("wb") as target:
        target.write(len(words).to_bytes(8, "little") + words)
        target.truncate(8 + len(words) + end)


def _of_layers(settings: dict[str, Any], name: str, layers: int | None) -> Models:
    return settings if layers is None else settings | {name: layers}


def _make_flux_folder(path: Path) -> Path:
    """The small folder, with the released one's length of T5's prompts."""
    make_flux_folder(path)
    file = path / "tokenizer_2/tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"model_max_length": 512}))
    return path


def _flux(layers: int | None) -> Models:
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
        projection_dim=768,
        hidden_act="quick_gelu",
        eos_token_id=2,
    )
    sizes = _of_layers({}, "num_layers", layers)
    return {
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(_t5_xxl()),
        "transformer": FluxTransformer2DModel(
            **_of_layers(sizes, "num_single_layers", layers), guidance_embeds=True
        ),
        "vae": _flux_autoencoder(),
    }


def _qwen(layers: int | None) -> Models:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={"depth": 1, "out_hidden_size": 3584},
    )
    return {
        "text_encoder": Qwen2_5_VLForConditionalGeneration(text),
        "transformer": QwenImageTransformer2DModel(
            **_of_layers({}, "num_layers", layers)
        ),
        "vae": AutoencoderKLQwenImage(),
    }


def _z_image(layers: int | None) -> Models:
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen3Model

    return {
        "text_encoder": Qwen3Model(_qwen3_4b()),
        "transformer": ZImageTransformer2DModel(**_of_layers({}, "n_layers", layers)),
        "vae": _flux_autoencoder(),
    }


def _flux2_klein(layers: int | None) -> Models:
    from diffusers import Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    sizes = {"num_layers": 5, "num_single_layers": 20}
    if layers is not None:
        sizes = dict.fromkeys(sizes, layers)
    return {
        "text_encoder": Qwen3ForCausalLM(_qwen3_4b()),
        "transformer": Flux2Transformer2DModel(
            **sizes,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        ),
        "vae": _flux2_autoencoder(),
    }


def _flux2_dev(layers: int | None) -> Models:
    from diffusers import Flux2Transformer2DModel
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    sizes = {"num_layers": 8, "num_single_layers": 48}
    if layers is not None:
        sizes = dict.fromkeys(sizes, layers)
    text = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "sliding_window": None,
    }
    config = Mistral3Config(text_config=text)
    return {
        "text_encoder": Mistral3ForConditionalGeneration(config),
        "transformer": Flux2Transformer2DModel(**sizes),
        "vae": _flux2_autoencoder(),
    }


def _flux2_autoencoder() -> torch.nn.Module:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def _qwen3_4b() -> Qwen3Config:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )


def _flux_autoencoder() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _t5_xxl() -> T5Config:
    from transformers import T5Config

    return T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        num_heads=64,
        d_ff=10240,
        num_layers=24,
        feed_forward_proj="gated-gelu",
    )


_COGVIDEOX: Final[dict[str, dict[str, Any]]] = {
    "2b": {"num_attention_heads": 30, "num_layers": 30},
    "5b": {"num_attention_heads": 48, "num_layers": 42},
    "1.5": {
        "num_attention_heads": 48,
        "num_layers": 42,
        "sample_height": 96,
        "sample_width": 170,
        "sample_frames": 81,
    },
}


def _cogvideox(variant: str) -> Callable[[int | None], Models]:
    def make(layers: int | None) -> Models:
        from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
        from transformers import T5EncoderModel

        sizes = _of_layers(_COGVIDEOX[variant], "num_layers", layers)
        return {
            "text_encoder": T5EncoderModel(_t5_xxl()),
            "transformer": CogVideoXTransformer3DModel(**sizes, **VARIANTS[variant]),
            "vae": AutoencoderKLCogVideoX(
                block_out_channels=(128, 256, 256, 512),
                down_block_types=("CogVideoXDownBlock3D",) * 4,
                up_block_types=("CogVideoXUpBlock3D",) * 4,
            ),
        }

    return make


FULL_SIZES: Final[Mapping[str, FullSize]] = {
    "flux1-dev": FullSize(
        _make_flux_folder,
        _flux,
        (64 * 64, 512),
        57,
        3072,
    ),
    "flux2-klein-4b": FullSize(
        lambda path: make_flux2_folder(path, is_distilled=True),
        _flux2_klein,
        (64 * 64, 512),
        25,
        3072,
    ),
    "flux2-dev": FullSize(
        make_flux2_dev_folder,
        _flux2_dev,
        (64 * 64, 512),
        56,
        6144,
    ),
    "qwen-image": FullSize(
        make_qwen_folder,
        _qwen,
        (83 * 83, 512),
        60,
        3072,
    ),
    "z-image": FullSize(
        make_z_image_folder,
        _z_image,
        (64 * 64, 512),
        30,
        3840,
    ),
    **{
        f"cogvideox-{variant}": FullSize(
            lambda path, variant=variant: make_cogvideox_folder(path, variant),  # type: ignore[misc]
            _cogvideox(variant),
            tokens,
            _COGVIDEOX[variant]["num_layers"],
            64 * _COGVIDEOX[variant]["num_attention_heads"],
        )
        for variant, tokens in (
            ("2b", (13 * 30 * 45, 226)),
            ("5b", (13 * 30 * 45, 226)),
            ("1.5", (11 * 48 * 85, 226)),
        )
    },
}
