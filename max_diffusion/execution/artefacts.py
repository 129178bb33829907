"""Compiled graphs as files: one module's machine code, and what must be known of it.

``NAME-KEY.mef.xz`` is MAX's own format, which holds no weights, compressed forty-fold;
``NAME-KEY.json`` beside it is the manifest. Both lie in a folder a target. Every file
appears whole or not at all, and under a name that says what is in it, so that several
processes and machines may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from max.dtype import DType

from graphs.weights import WeightNeeds, WeightSlot, WeightSpec

from ..core.files import prepared_folder, write_file, write_text

if TYPE_CHECKING:
    from max.engine import CompiledModel

_PACKAGES: Final = ("max-core", "mojo-compiler")
_SUFFIX: Final = ".mef.xz"
# Of a key's 256 bits, in a file's name.
_DIGITS: Final = 32


class ArtefactError(Exception):
    """Says why compiled graphs cannot be used."""


@final
@dataclass(frozen=True)
class Manifest:
    """What is known of a module's compiled graphs without loading them."""

    name: str
    """Of the module, such as ``transformer.full``."""
    key: str
    """Hash of the module's text and the compiler's versions: equal for equal graphs."""
    subject: str
    """Hash of what the module was made of: component, configuration, dtype."""
    recipe: str | None
    """Hash of the subject, of the sources that made graphs of it, and of the compiler's
    versions; ``None`` where sources outside the package had a part."""
    target: str
    """Name of the target whose machine code it is."""
    versions: Mapping[str, str]
    """Packages that compiled it."""
    graphs: tuple[str, ...]
    """Names of the graphs."""
    sha256: str
    """Of the compressed file."""
    needs: WeightNeeds
    """Weights that the graphs draw from."""

    @property
    def stem(self) -> str:
        """Name of its files without suffixes."""
        return f"{self.name}-{self.key[:_DIGITS]}"

    def to_json(self) -> str:
        """Returns the manifest as text, with a hash of itself."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["needs"] = _plain(self.needs)
        return json.dumps({"manifest_sha256": hash_of(values), **values}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what :meth:`to_json` has written.

        Raises:
            ArtefactError: It is damaged, or of another form.
        """
        try:
            values = json.loads(text)
            is_whole = values.pop("manifest_sha256") == hash_of(values)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as err:
            raise ArtefactError("the manifest is damaged") from err
        if not is_whole or values.keys() != {item.name for item in fields(cls)}:
            raise ArtefactError("the manifest is damaged, or of another release")
        try:
            values["graphs"] = tuple(values["graphs"])
            values["needs"] = _needs(values["needs"])
            found = cls(**values)
            _check_kinds(found)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise ArtefactError("the manifest is of another release") from err
        return found


@final
@dataclass(frozen=True)
class Artefact:
    """A module's compiled graphs in a folder."""

    folder: Path
    """Of the target."""
    manifest: Manifest

    def read(self) -> CompiledModel:
        """Reads the graphs; they are not initialised.

        Raises:
            ArtefactError: The file is missing, or not the one that was written.
        """
        from max.engine import read

        try:
            return read(BytesIO(lzma.decompress(self.packed())))
        except (lzma.LZMAError, RuntimeError) as err:
            raise ArtefactError(f"{self.path} is no compiled graph of MAX") from err

    @property
    def path(self) -> Path:
        """The compressed file."""
        return self.folder / (self.manifest.stem + _SUFFIX)

    def packed(self) -> bytes:
        """Returns the file's bytes.

        Raises:
            ArtefactError: The file is missing, or not the one that was written.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                raise ArtefactError(f"{self.path} is no file")
            packed = self.path.read_bytes()
        except OSError as err:
            raise ArtefactError(f"{self.path} cannot be read ({err.strerror})") from err
        if sha256_of(packed) != self.manifest.sha256:
            raise ArtefactError(f"{self.path} is damaged (its sha256 is another)")
        return packed


def compiler_versions() -> dict[str, str]:
    """Returns the versions of the packages that compile and run graphs."""
    return {name: version(name) for name in _PACKAGES}


def hash_of(*parts: Any) -> str:
    """Returns the sha256 of values as JSON has them."""
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, default=repr).encode()
    ).hexdigest()


def write_artefact(folder: Path, manifest: Manifest, mef: bytes) -> Artefact:
    """Writes a compiled module into the folder of its target.

    Args:
        folder: Has a folder for every target.
        manifest: What is known of the module; the file's hash is filled in.
        mef: The module as MAX exports it.

    Raises:
        RequestError: The folder cannot be written to.
    """
    own = prepared_folder(folder / manifest.target)
    # Symbols of a hundred thousand characters come again megabytes later.
    packed = lzma.compress(mef, preset=9 | lzma.PRESET_EXTREME)
    artefact = Artefact(own, replace(manifest, sha256=sha256_of(packed)))
    write_file(artefact.path, lambda file: file.write(packed))
    # Last: what has a manifest is whole.
    return write_manifest(artefact)


def write_manifest(artefact: Artefact) -> Artefact:
    """Writes what is known of a module beside the file that it is in.

    Raises:
        RequestError: The folder cannot be written to.
    """
    manifest = artefact.manifest
    write_text(artefact.folder / f"{manifest.stem}.json", manifest.to_json())
    return artefact


def sha256_of(packed: bytes) -> str:
    """Returns the hash that tells whether a file is the one that was written."""
    return hashlib.sha256(packed).hexdigest()


def artefacts_in(
    folder: Path, name: str, problems: list[str] | None = None
) -> list[Artefact]:
    """Returns what a target's folder has of a module.

    Args:
        folder: May be missing.
        name: Of the module.
        problems: Receives a line for each that cannot be used.
    """
    found = []
    problems = [] if problems is None else problems
    for stem, suffixes in sorted(_stems(folder, name, problems).items()):
        if ".json" not in suffixes:
            problems.append(f"{folder / stem}{_SUFFIX} has no manifest beside it")
            continue
        manifest_path = folder / f"{stem}.json"
        if not manifest_path.is_file():
            problems.append(f"{manifest_path} is no file")
            continue
        try:
            text = manifest_path.read_text(encoding="utf-8")
            artefact = Artefact(folder, Manifest.from_json(text))
            if artefact.manifest.stem != stem:
                raise ArtefactError(f"it was {artefact.manifest.stem}.json; name it so")
        except (OSError, UnicodeDecodeError) as err:
            said = getattr(err, "strerror", None) or "it is no text"
            problems.append(f"{manifest_path} cannot be read ({said})")
        except ArtefactError as err:
            problems.append(f"{manifest_path}: {err}")
        else:
            found.append(artefact)
    return found


def _stems(folder: Path, name: str, problems: list[str]) -> dict[str, set[str]]:
    """Suffixes by the stem of all files of a module."""
    stems: dict[str, set[str]] = {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return stems
    except OSError as err:
        problems.append(f"{folder} cannot be read ({err.strerror})")
        return stems
    for each in names:
        for suffix in (_SUFFIX, ".json"):
            stem = each.removesuffix(suffix)
            if stem != each and stem.rpartition("-")[0] == name:
                stems.setdefault(stem, set()).add(suffix)
    return stems


def _check_kinds(manifest: Manifest) -> None:
    """Checks that a manifest's own values are of the kinds that are written.

    Raises:
        TypeError: One is not.
    """
    texts = (manifest.name, manifest.key, manifest.subject, manifest.target)
    for text in (*texts, manifest.recipe or "", manifest.sha256, *manifest.graphs):
        if not isinstance(text, str):
            raise TypeError(text)
    if not isinstance(manifest.versions, dict):
        raise TypeError(manifest.versions)


def _plain(needs: WeightNeeds) -> dict[str, Any]:
    """Weights as JSON: shapes and dtypes of tensors, and what slots are made of."""
    return {
        "prefix": needs.prefix,
        "tensors": {
            name: [spec.shape, spec.dtype.name] for name, spec in needs.specs.items()
        },
        "slots": [
            [slot.tensors, slot.shape, slot.dtype.name, slot.columns, slot.is_packed]
            for slot in needs.slots.values()
        ],
    }


def _needs(plain: Mapping[str, Any]) -> WeightNeeds:
    specs = {
        name: WeightSpec(tuple(shape), DType[dtype])
        for name, (shape, dtype) in plain["tensors"].items()
    }
    slots: dict[str, WeightSlot] = {}
    for (tensor, *others), shape, dtype, columns, is_packed in plain["slots"]:
        slot = WeightSlot(
            tensor,
            tuple(shape),
            DType[dtype],
            None if columns is None else tuple(columns),
            tuple(others),
            is_packed,
        )
        slots[slot.key] = slot
    return WeightNeeds(plain["prefix"], specs, slots)
