"""Writes a model of random weights, one file after the other.

A process of its own, ``python -m benchmarks.gpu.folder JOB``: what it draws on the GPU
is given back when it ends.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from max_diffusion.pipelines.opening import demo_model_path

_CLASSES: Final[Mapping[str, Callable[[dict[str, Any]], Any]]] = {
    "transformer": lambda config: FluxTransformer2DModel.from_config(config),
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "text_encoder_2": lambda config: T5EncoderModel(T5Config(**config)),
    "vae": lambda config: AutoencoderKL.from_config(config),
}
_DOUBLES: Final = ("encoder.embed_tokens.weight",)  # T5's, the same as shared.weight
_FILE_BYTES: Final = 2 << 30  # of a file at most, and so of host memory


def main() -> None:
    """Writes the folder that the job describes."""
    job = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    folder = Path(job["folder"])
    _copy_rest(folder, job["tokens"])
    for role in job["roles"]:
        path = folder / role / "config.json"
        config = json.loads(path.read_text()) | job["configs"].get(role, {})
        path.write_text(json.dumps(config, indent=1) + "\n")
        with torch.device("meta"):
            state = _CLASSES[role](config).state_dict()
        shapes = {
            key: tuple(t.shape) for key, t in state.items() if key not in _DOUBLES
        }
        _write(folder / role, role, shapes, generator)
    print("{}")


def _copy_rest(folder: Path, tokens: Mapping[str, int]) -> None:
    """The demo model without its weights, and with other limits of its tokenizers."""
    left_out = shutil.ignore_patterns("*.safetensors", "cache_calibration.json")
    shutil.copytree(demo_model_path(), folder, dirs_exist_ok=True, ignore=left_out)
    for role, limit in tokens.items():
        path = folder / role / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"model_max_length": limit}
        path.write_text(json.dumps(config, indent=1) + "\n")


def _write(
    folder: Path,
    role: str,
    shapes: Mapping[str, tuple[int, ...]],
    generator: torch.Generator,
) -> None:
    is_ours = role in ("transformer", "vae")  # diffusers' names of files
    stem = "diffusion_pytorch_model" if is_ours else "model"
    groups = list(_files(shapes))
    places: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        ending = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        file = f"{stem}{ending}.safetensors"
        tensors = {name: _random(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": places}
        text = json.dumps(index, indent=1) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text)


def _files(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors, file by file."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        own = 2 * math.prod(shape)
        if names and size + own > _FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def _random(
    name: str, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """Spread so that activations neither vanish nor grow; norms' scales are about 1."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1:
        values = 0.1 * values + float(name.endswith("weight"))
    else:
        values /= math.sqrt(math.prod(shape[1:]))
    return values.to(torch.bfloat16).cpu()


if __name__ == "__main__":
    main()
