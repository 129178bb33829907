"""One LoRA file: the low-rank pairs in it, by the file's own names of modules."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from ..errors import ModelLoadError
from .computed import is_number, to_float32
from .reading import mapped_bytes, read_json, short_name, shown
from .safetensors_file import read_file
from .tensors import AbstractStoredTensor
from .weights import listed

# What ends the names of a pair's halves, down before up. The last ones are XLabs', and
# older diffusers' with more before them.
_HALVES: Final = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".down.weight", ".up.weight"),
)
_ALPHA: Final = ".alpha"
# Adapters of other kinds, by what only their names have.
_OTHER_KINDS: Final = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("DoRA", r"\.(dora_scale|lora_magnitude_vector\b.*)$"),
        ("LoHa", r"\.hada_"),
        ("LoKr", r"\.lokr_"),
        ("OFT", r"\.b?oft_"),
        ("GLoRA", r"\.[ab][12]\.weight$"),
        ("IA3", r"\.(on_input|ia3_l\b.*)$"),
        ("LoRA with a middle matrix", r"\.lora_mid\."),
        ("LoRA with biases", r"\.lora_(A|B|up|down)(\.default)?\.bias$"),
        ("LoRA of embeddings", r"\.lora_embedding_[AB]$"),
        ("whole differences", r"\.(diff|diff_b|set_weight|w_norm|b_norm)$"),
    )
)
_PICKLES: Final = (".bin", ".ckpt", ".pt", ".pth")
# What a folder with an adapter has, as PEFT and as diffusers save it.
_PEFT_FILE: Final = "adapter_model.safetensors"
_IN_FOLDER: Final = (_PEFT_FILE, "pytorch_lora_weights.safetensors")
_PEFT_CONFIG: Final = "adapter_config.json"
_LARGEST_ALPHA: Final = float(np.finfo(np.float32).max)
_PEFT_STEM: Final = "base_model.model"
_DIFFUSERS_CONFIGS: Final = "lora_adapter_metadata"
_SWITCHES: Final = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias")
# First values of PEFT's that are taken out of the model's own weights.
_CHANGING_STARTS: Final = ("pissa", "olora", "corda", "lora_ga", "loftq")


@final
@dataclass(frozen=True)
class LoraPair:
    """What changes one module of the file: ``alpha / rank up @ down``."""

    down: AbstractStoredTensor
    """``(rank, in)``, or of a convolution ``(rank, in, k, k)``."""
    up: AbstractStoredTensor
    """``(features, rank)``, or ``(features, rank, 1, 1)``."""
    alpha: float
    """The rank, where the file does not say."""


@final
@dataclass(frozen=True)
class LoraFile:
    """The pairs of one file; their values are finite, and mapped."""

    path: Path
    pairs: Mapping[str, LoraPair]
    """By the file's name of the module, such as ``transformer.proj_out``."""

    @classmethod
    def read(cls, path: Path) -> LoraFile:
        """Reads a file's header, and its values once, to see that they are finite.

        Args:
            path: A safetensors file, or a folder as PEFT and diffusers save them.

        Raises:
            ModelLoadError: It cannot be read, is damaged, is an adapter of another kind
                than LoRA, or has names, ranks or values that no LoRA has.
        """
        path = _file_of(path)
        where = f"lora {short_name(path)}"
        stored, told = read_file(path)
        # What was checked is what is merged, though the file be replaced meanwhile; and
        # a choice reads hundreds of small halves.
        mapped = mapped_bytes(path)
        tensors = {
            name: replace(
                each,
                mapped=mapped,
                stamp=each.stamp and replace(each.stamp, is_mapped=True),
            )
            for name, each in stored.items()
        }
        _check_kind(where, tensors)
        settings = _settings(path, where, told.get(_DIFFUSERS_CONFIGS))
        stems, rest = _halves(tensors)
        problems = []
        if rest:
            problems.append(f"{len(rest)} tensors are of no LoRA: {listed(rest)}")
        pairs: dict[str, LoraPair] = {}
        halved, ranks = [], []
        for stem, found in stems.items():
            if len(found) < 2:
                halved.append(shown(next(iter(found.values())).name))
                continue
            down, up = found["down"], found["up"]
            if not _is_pair(down, up):
                ranks.append(f"{shown(stem)} (down {down.shape}, up {up.shape})")
                continue
            alpha = tensors.get(stem + _ALPHA)
            of_peft = _settings_of(stem, settings)
            rank = down.shape[0]
            if alpha is not None:
                pairs[stem] = LoraPair(down, up, _number(where, alpha))
            else:
                pairs[stem] = LoraPair(down, up, of_peft.alpha(where, rank))
        if halved:
            problems.append(f"{len(halved)} without their other half: {listed(halved)}")
        if ranks:
            problems.append(f"{len(ranks)} modules of two ranks: {listed(ranks)}")
        if problems:
            raise ModelLoadError(
                f"{where}: {'; '.join(problems)}; download it again, or give another"
            )
        if not pairs:
            raise ModelLoadError(
                f"{where}: no LoRA is in it; give a file with lora_A and lora_B, or "
                "lora_down and lora_up"
            )
        _check_values(where, pairs)
        return cls(path, pairs)


@final
@dataclass(frozen=True)
class _PeftSettings:
    """What PEFT keeps beside the tensors, of one module."""

    module: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def alpha(self, where: str, rank: int) -> float:
        """The alpha that gives PEFT's factor with ``alpha / rank``."""
        alpha = self.values.get("lora_alpha", rank)
        patterns = self.values.get("alpha_pattern") or {}
        try:
            for pattern, value in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", self.module):
                    alpha = value
                    break
        except (AttributeError, re.error) as err:
            raise ModelLoadError(
                f"{where}: alpha_pattern must be alphas by patterns, got "
                f"{patterns!r:.80}; correct its configuration"
            ) from err
        is_known = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        # An int may be too large for any float.
        if not is_known or not abs(alpha) <= _LARGEST_ALPHA:
            raise ModelLoadError(
                f"{where}: lora_alpha must be a number that float32 holds, got "
                f"{alpha!r:.80}; correct its configuration"
            )
        if self.values.get("use_rslora"):
            return float(alpha) * math.sqrt(rank)  # its factor is alpha / sqrt(rank)
        return float(alpha)


def _file_of(path: Path) -> Path:
    """The file itself, or a folder's."""
    if os.path.isdir(path):  # is_dir raises where a name is too long
        found = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        if len(found) != 1:
            raise ModelLoadError(
                f"lora {path}: expected {' or '.join(_IN_FOLDER)} in this folder, got "
                f"{len(found)} of them; give the file"
            )
        return found[0]
    if path.suffix in _PICKLES:
        raise ModelLoadError(
            f"lora {short_name(path)}: expected a safetensors file, got {path.suffix}, "
            "a pickle, which is not read; save it as safetensors"
        )
    return path


def _check_kind(where: str, names: Collection[str]) -> None:
    for kind, pattern in _OTHER_KINDS:
        found = [name for name in names if pattern.search(name)]
        if found:
            raise ModelLoadError(
                f"{where}: it is {kind}, of which nothing is computed here "
                f"({len(found)} tensors such as {shown(found[0])}); give a plain LoRA"
            )


def _settings(
    path: Path, where: str, text: str | None
) -> Mapping[str, Mapping[str, Any]]:
    """PEFT's settings by what begins the names of modules they are of.

    Args:
        path: The file, beside which there may be some.
        where: For messages.
        text: Those in its header, as diffusers writes them.
    """
    found: dict[str, dict[str, Any]] = {}
    if path.name == _PEFT_FILE and (path.parent / _PEFT_CONFIG).is_file():
        found[_PEFT_STEM] = read_json(path.parent / _PEFT_CONFIG)
    if text is not None:
        try:
            for key, value in json.loads(text).items():
                component, _, name = key.partition(".")
                found.setdefault(component, {})[name] = value
        except (ValueError, AttributeError, RecursionError) as err:
            raise ModelLoadError(
                f"{where}: its {_DIFFUSERS_CONFIGS} is no JSON object; download it "
                "again"
            ) from err
    for settings in found.values():
        _check_settings(where, settings)
    return found


def _check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Refuses what would change more, or otherwise, than a plain LoRA's pairs do."""
    for name in _SWITCHES:
        value = settings.get(name)
        if value is not None and not isinstance(value, bool):
            raise ModelLoadError(
                f"{where}: {name} must be true or false, got {value!r:.80}; correct "
                "its configuration"
            )
    kind = str(settings.get("peft_type", "LORA"))
    saved, start = settings.get("modules_to_save"), settings.get("init_lora_weights")
    is_changing = str(start).lower().startswith(_CHANGING_STARTS)
    told = {
        shown(kind): kind != "LORA",
        "DoRA": settings.get("use_dora"),
        f"init_lora_weights {start!r:.40}, a change of the model itself": is_changing,
        "fan_in_fan_out": settings.get("fan_in_fan_out"),
        "lora_bias": settings.get("lora_bias"),
        f"modules_to_save {saved!r:.80}": saved,
    }
    for what, is_said in told.items():
        if is_said:
            raise ModelLoadError(
                f"{where}: its configuration says {what:.100}, of which nothing is "
                "computed here; give a plain LoRA"
            )


def _settings_of(stem: str, settings: Mapping[str, Mapping[str, Any]]) -> _PeftSettings:
    for start, values in settings.items():
        if stem.startswith(f"{start}."):
            return _PeftSettings(stem.removeprefix(f"{start}."), values)
    return _PeftSettings()


def _halves(
    tensors: Mapping[str, AbstractStoredTensor],
) -> tuple[dict[str, dict[str, AbstractStoredTensor]], list[str]]:
    """Halves by module and role, and the names that are none."""
    stems: dict[str, dict[str, AbstractStoredTensor]] = {}
    rest = []
    for name, tensor in tensors.items():
        for halves in _HALVES:
            end = next((half for half in halves if name.endswith(half)), None)
            if end is not None:
                role = "down" if end == halves[0] else "up"
                stem = name.removesuffix(end)
                # Of two spellings in one file the second is told as unknown.
                if role in stems.setdefault(stem, {}):
                    rest.append(name)
                stems[stem].setdefault(role, tensor)
                break
        else:
            rest.append(name)
    alphas = {stem + _ALPHA for stem in stems}
    return stems, [shown(name) for name in rest if name not in alphas]


def _is_pair(down: AbstractStoredTensor, up: AbstractStoredTensor) -> bool:
    return (
        min(len(down.shape), len(up.shape)) > 1
        and down.shape[0] == up.shape[1] > 0
        and math.prod(up.shape[2:]) == 1
    )


def _number(where: str, tensor: AbstractStoredTensor) -> float:
    value, dtype = math.nan, tensor.dtype
    is_known = dtype is not None and (is_number(dtype) or dtype.is_integral())
    if dtype is not None and is_known and math.prod(tensor.shape) == 1:
        value = to_float32(tensor.read(), dtype).item()
    if not math.isfinite(value):
        raise ModelLoadError(
            f"{where}: {shown(tensor.name)} must be one finite number, got "
            f"{tensor.code} {tensor.shape}; download it again"
        )
    return value


def _check_values(where: str, pairs: Mapping[str, LoraPair]) -> None:
    """Refuses what is no number, NaN and infinity, of all tensors at once."""
    unknown, broken = [], []
    for pair in pairs.values():
        for tensor in (pair.down, pair.up):
            dtype = tensor.dtype
            # Of integers the scale is not known that they were quantised with.
            if dtype is None or dtype.is_integral() or not is_number(dtype):
                unknown.append(f"{shown(tensor.name)} ({tensor.code})")
            elif not np.isfinite(to_float32(tensor.read(), dtype)).all():
                broken.append(shown(tensor.name))
    if unknown:
        raise ModelLoadError(
            f"{where}: {len(unknown)} tensors of a dtype that is not computed with: "
            f"{listed(unknown)}; save it as float32, float16 or bfloat16"
        )
    if broken:
        raise ModelLoadError(
            f"{where}: {len(broken)} tensors hold NaN or infinity: {listed(broken)}; "
            "the file is damaged: download it again"
        )
