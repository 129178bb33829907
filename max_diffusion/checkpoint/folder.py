"""A model folder in the diffusers layout."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelLoadError

INDEX_NAME = "model_index.json"
# What diffusers and transformers call a component's weights.
_STEMS = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a ``model_index.json`` and one folder a component."""

    path: Path
    class_name: str
    """Pipeline class the folder was saved from."""
    roles: Mapping[str, tuple[str, str]]
    """Library and class of each component, by role."""
    variant: str | None = None
    """Weight files asked for, for example ``fp16``; ``None`` is the plain ones."""

    @classmethod
    def open(cls, path: Path, variant: str | None = None) -> ModelFolder:
        """Reads ``model_index.json``.

        Raises:
            ModelLoadError: It is missing, no JSON, or names no class.
        """
        if not (path / INDEX_NAME).is_file():
            raise ModelLoadError(
                f"{path}: no {INDEX_NAME}; a model folder in the diffusers layout has "
                "one: give the folder that holds it"
            )
        index = read_json(path / INDEX_NAME)
        class_name = index.get("_class_name")
        if not isinstance(class_name, str):
            raise ModelLoadError(
                f"{path.name}/{INDEX_NAME}: _class_name must name a pipeline, got "
                f"{class_name!r}"
            )
        roles = {
            role: (entry[0], entry[1])
            for role, entry in index.items()
            if isinstance(entry, list) and len(entry) == 2 and all(entry)
        }
        return cls(path, class_name, roles, variant)

    def require(self, role: str, class_names: Collection[str]) -> None:
        """Checks that a component is there and of a known class.

        Raises:
            ModelLoadError: It is not.
        """
        if role not in self.roles:
            raise ModelLoadError(
                f"{self.path.name}: {INDEX_NAME} lists no {role}; the model is "
                "incomplete: download it again"
            )
        found = self.roles[role][1]
        if found not in class_names:
            raise ModelLoadError(
                f"{self.path.name}: {role} must be a {' or '.join(class_names)}, got "
                f"{found}"
            )
        if not (self.path / role).is_dir():
            raise ModelLoadError(
                f"{self.path.name}: the folder {role} is missing, though {INDEX_NAME} "
                "lists it; download it again"
            )

    def config(self, role: str) -> dict[str, Any]:
        """A component's ``config.json`` or ``scheduler_config.json``."""
        for name in ("config.json", "scheduler_config.json"):
            if (self.path / role / name).is_file():
                return read_json(self.path / role / name)
        raise ModelLoadError(
            f"{self.path.name}/{role}: no config.json; the folder is incomplete: "
            "download it again"
        )

    def weight_files(self, role: str) -> list[Path]:
        """A component's safetensors files.

        Those of the variant asked for, else the plain ones, else the only variant.

        Raises:
            ModelLoadError: None, a variant that is not there, or a shard missing.
        """
        folder = self.path / role
        choices = _weight_sets(folder)
        where = f"{self.path.name}/{role}"
        if not choices:
            pickles = [p.name for p in folder.glob("*.bin")]
            hint = (
                f"only {pickles[0]}, a pickle, which is not read: save the model again "
                "with safe_serialization=True"
                if pickles
                else "download the model again"
            )
            raise ModelLoadError(f"{where}: no safetensors weights; {hint}")
        wanted = self.variant or ""
        if wanted in choices:
            return choices[wanted]
        if not wanted and len(choices) == 1:
            return next(iter(choices.values()))
        there = ", ".join(name or "(none)" for name in sorted(choices))
        asked = f"variant {wanted!r} is" if wanted else "plain weights are"
        raise ModelLoadError(f"{where}: {asked} not there; variants found: {there}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelLoadError: It is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as err:
        raise ModelLoadError(
            f"{path.parent.name}/{path.name}: not readable as JSON ({err}); download "
            "it again"
        ) from err
    if not isinstance(value, dict):
        raise ModelLoadError(
            f"{path.parent.name}/{path.name}: expected a JSON object, got "
            f"{type(value).__name__}"
        )
    return value


def _weight_sets(folder: Path) -> dict[str, list[Path]]:
    """Files of each variant in a component's folder; the plain ones under ``""``."""
    sets: dict[str, list[Path]] = {}
    for stem in _STEMS:
        for path in sorted(folder.glob(f"{stem}*.safetensors.index*.json")):
            # "model.safetensors.index.fp16.json" -> "fp16"
            variant = path.name.removeprefix(f"{stem}.safetensors.index")
            sets[variant.removesuffix(".json").strip(".")] = _shards(folder, path)
        for path in sorted(folder.glob(f"{stem}*.safetensors")):
            # "model.fp16.safetensors" -> "fp16"; shards are listed by their index.
            middle = path.name.removeprefix(stem).removesuffix(".safetensors")
            if "-of-" not in middle:
                sets.setdefault(middle.strip("."), [path])
    return sets


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and name == Path(name).name
        for name in weight_map.values()
    ):
        raise ModelLoadError(
            f"{folder.name}/{index.name}: no weight_map from weights to files of this "
            "folder; download it again"
        )
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise ModelLoadError(
            f"{folder.name}/{index.name}: names {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", not in the folder; download the model again"
        )
    return shards
