"""Which of a component's weight files are used, told from the files' names.

A set of weights is one file, or shards that an index names. A folder may hold several:
the plain one and variants, such as ``fp16``. What is chosen is what diffusers and
transformers choose, each for its own components.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import ModelLoadError
from .reading import read_json, short_name

# A middle part of a shard's name.
_SHARD = r"-\d+-of-\d+"


def chosen_set(
    model: str,
    role: str,
    libraries: Mapping[str, str],
    names: Mapping[str, Collection[str]],
    variant: str | None,
) -> str:
    """The file that stands for a component's weights: safetensors, or an index.

    Of the variant asked for; where a component lacks it and another has it, the plain
    one. If none is asked for, the plain one, or else the only variant.

    Args:
        model: For messages.
        role: The component.
        libraries: ``diffusers`` or ``transformers``, by component.
        names: Files in the components' folders.
        variant: Such as ``fp16``; ``None`` is the plain set.

    Raises:
        ModelLoadError: There is none, or not the one asked for.
    """
    where, files = f"{model}/{role}", names.get(role, ())
    stem = _stem(libraries.get(role))
    wanted = variant or ""
    found = _set(stem, files, wanted)
    if found is None and wanted:
        is_elsewhere = any(
            _set(_stem(libraries.get(other)), listed, wanted)
            for other, listed in names.items()
        )
        found = _set(stem, files, "") if is_elsewhere else None
    if found is not None:
        return found
    there = [name for name in _variants(stem, files) if _set(stem, files, name)]
    lone = _shards(stem, files)
    if wanted in lone or (lone and not there):
        of = wanted if wanted in lone else min(lone)
        dotted = f".{of}" if of else ""
        raise ModelLoadError(
            f"{where}: {lone[of]} is one of several shards, but their index "
            f"{stem}.safetensors.index{dotted}.json is missing; download it too"
        )
    if not there:
        raise ModelLoadError(f"{where}: no safetensors weights; {_hint(files)}")
    if not wanted and len(there) == 1:
        return _set(stem, files, there[0]) or ""
    asked = f"variant {wanted!r} is" if wanted else "plain weights are"
    raise ModelLoadError(
        f"{where}: {asked} not there; variants found: "
        + ", ".join(name or "(none)" for name in there)
    )


def shard_names(index: Path) -> list[str]:
    """Names of the shards that an index names, sorted.

    Raises:
        ModelLoadError: It is no index, or names files of other folders.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(
            f"{short_name(index)}: no weight_map from weights to files; download it "
            "again"
        )
    for name in weight_map.values():
        is_name = isinstance(name, str) and name == Path(name).name
        if not (is_name and name.isprintable() and name.endswith(".safetensors")):
            raise ModelLoadError(
                f"{short_name(index)}: weight_map must name safetensors files of this "
                f"folder, got {name!r}; download it again"
            )
    return sorted(set(weight_map.values()))


def indexed_names(index: Path) -> list[str]:
    """Names of the weights that an index lists."""
    return list(read_json(index)["weight_map"])


def is_index(name: str) -> bool:
    """Whether a set's file is an index of shards."""
    return name.endswith(".json")


def _stem(library: str | None) -> str:
    return "model" if library == "transformers" else "diffusion_pytorch_model"


def _set(stem: str, files: Collection[str], variant: str) -> str | None:
    """The file of one variant's set; the plain set's is ``""``."""
    dotted = f".{variant}" if variant else ""
    single = f"{stem}{dotted}.safetensors"
    # The second naming of an index is the older one.
    indexes = [
        f"{stem}.safetensors.index{dotted}.json",
        f"{stem}.safetensors{dotted}.index.json",
    ]
    # With both there, transformers takes the file and diffusers the index.
    order = [single, *indexes] if stem == "model" else [*indexes, single]
    return next((name for name in order if name in files), None)


def _variants(stem: str, files: Collection[str]) -> list[str]:
    """Variants that files' names speak of, sorted; the plain set's is ``""``."""
    patterns = (
        rf"{stem}(?:\.(.+))?\.safetensors",
        rf"{stem}\.safetensors\.index(?:\.(.+))?\.json",
        rf"{stem}\.safetensors\.(.+)\.index\.json",
    )
    matches = (re.fullmatch(p, name) for name in files for p in patterns)
    found = {match[1] or "" for match in matches if match}
    return sorted(name for name in found if not re.search(_SHARD, name))


def _shards(stem: str, files: Collection[str]) -> dict[str, str]:
    """The first shard of each variant, by the newer and by the older naming."""
    # "model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.fp16.safetensors"
    pattern = rf"{stem}(?:\.(.+))?{_SHARD}(?:\.(.+))?\.safetensors"
    first: dict[str, str] = {}
    for name in sorted(files):
        if match := re.fullmatch(pattern, name):
            first.setdefault(match[1] or match[2] or "", name)
    return first


def _hint(files: Collection[str]) -> str:
    pickles = sorted(name for name in files if name.endswith(".bin"))
    if not pickles:
        return "the model is incomplete: download it again"
    return (
        f"only {pickles[0]}, a pickle, which is not read: save the model again with "
        "safe_serialization=True"
    )
