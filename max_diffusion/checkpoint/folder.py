"""A model folder in the diffusers layout."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelLoadError
from .reading import names_in, read_json, short_name
from .safetensors_file import read_header
from .weight_sets import chosen_set, indexed_names, is_index, shard_names

logger = logging.getLogger(__name__)

INDEX_NAME = "model_index.json"
# What the names of plain weights end in; those of variants say more.
_PLAIN = ("safetensors", "safetensors.index.json")


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
    name: str = ""
    """For messages: the folder's own name, or the repository's on the hub."""
    left_out: frozenset[str] = frozenset()
    """Roles listed as null: the pipeline was saved without them."""

    @classmethod
    def open(
        cls, path: Path, variant: str | None = None, name: str | None = None
    ) -> ModelFolder:
        """Reads ``model_index.json``.

        Args:
            path: The folder.
            variant: Weight files to take.
            name: For messages; default the folder's own.

        Raises:
            ModelLoadError: It is missing, no JSON, or names no class.
        """
        name = name or path.name or str(path.resolve())
        if INDEX_NAME not in names_in(path):
            raise ModelLoadError(
                f"{path}: no {INDEX_NAME}; a model folder in the diffusers layout has "
                "one: give the folder that holds it"
            )
        index = read_json(path / INDEX_NAME)
        class_name = index.get("_class_name")
        if not isinstance(class_name, str):
            raise ModelLoadError(
                f"{name}/{INDEX_NAME}: _class_name must name a pipeline, got "
                f"{class_name!r}"
            )
        pairs = {
            role: (entry[0], entry[1])
            for role, entry in index.items()
            # A role is a folder's name, never a path out of the model's.
            if isinstance(entry, list) and len(entry) == 2 and role.isidentifier()
        }
        roles = {role: pair for role, pair in pairs.items() if all(pair)}
        left_out = frozenset(pairs.keys() - roles.keys())
        return cls(path, class_name, roles, variant, name, left_out)

    def check_listed(self, role: str, class_names: Collection[str]) -> None:
        """Checks that a component is listed, and of a known class.

        Raises:
            ModelLoadError: It is not.
        """
        if role in self.left_out:
            raise ModelLoadError(
                f"{self.name}: {INDEX_NAME} lists {role} as null, so the model was "
                "saved without it; save the whole pipeline"
            )
        if role not in self.roles:
            raise ModelLoadError(
                f"{self.name}: {INDEX_NAME} lists no {role}; the model is "
                "incomplete: download it again"
            )
        found = self.roles[role][1]
        if found not in class_names:
            raise ModelLoadError(
                f"{self.name}: {role} must be a {' or '.join(class_names)}, got {found}"
            )

    def require(self, role: str, class_names: Collection[str]) -> None:
        """:meth:`check_listed`, and that its folder is there.

        Raises:
            ModelLoadError: It is not.
        """
        self.check_listed(role, class_names)
        if not (self.path / role).is_dir():
            raise ModelLoadError(
                f"{self.name}: the folder {role} is missing, though {INDEX_NAME} "
                "lists it; download it again"
            )

    def config(self, role: str) -> dict[str, Any]:
        """A component's ``config.json`` or ``scheduler_config.json``."""
        there = names_in(self.path / role)
        for name in ("config.json", "scheduler_config.json"):
            if name in there:
                return read_json(self.path / role / name)
        raise ModelLoadError(
            f"{self.name}/{role}: no config.json; the folder is incomplete: "
            "download it again"
        )

    def weight_files(self, role: str) -> list[Path]:
        """A component's safetensors files, see :func:`chosen_set`.

        Raises:
            ModelLoadError: None, a variant that is not there, a shard that is missing,
                or one that lacks a weight that the index lists.
        """
        folders = {name: self.path / name for name in self.roles}
        names = {
            name: names_in(folder)
            for name, folder in folders.items()
            if folder.is_dir()
        }
        libraries = {name: pair[0] for name, pair in self.roles.items()}
        chosen = chosen_set(self.name, role, libraries, names, self.variant)
        path = folders[role] / chosen
        is_plain = chosen.split(".", 1)[1] in _PLAIN
        if is_plain == bool(self.variant):
            logger.info(
                "%s/%s: no %s weights there, so %s is used",
                *(self.name, role, self.variant or "plain", chosen),
            )
        if not is_index(chosen):
            return [path]
        shards = shard_names(path)
        missing = [name for name in shards if name not in names[role]]
        if missing:
            raise ModelLoadError(
                f"{short_name(path)}: names {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + ", not in the folder; download the model again"
            )
        files = [folders[role] / name for name in shards]
        held = {weight for file in files for weight in read_header(file)}
        lacking = [weight for weight in indexed_names(path) if weight not in held]
        if lacking:
            raise ModelLoadError(
                f"{short_name(path)}: lists {lacking[0]}"
                + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
                + ", which none of its shards holds; download the model again"
            )
        return files
