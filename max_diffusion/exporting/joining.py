"""Modules with much in common in one file, and files that nobody needs any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ..execution.artefacts import Artefact, artefacts_in, write_artefacts


def join(folder: Path, target: str, names: Sequence[str]) -> list[Artefact]:
    """Puts a target's modules into one file, unless they are.

    Args:
        folder: From :func:`~max_diffusion.exporting.export_graphs`.
        target: Name of the target.
        names: Of the modules. Reading one decompresses those before it as well.

    Raises:
        ArtefactError: A file is damaged.
        RequestError: The folder cannot be written to.
    """
    own = folder / target
    found = [each for name in names for each in artefacts_in(own, name)]
    if len({each.manifest.file for each in found}) < 2:
        return found
    manifests = [each.manifest for each in found]
    return write_artefacts(folder, manifests, [each.mef() for each in found])


def remove_others(folder: Path, wanted: Collection[Artefact]) -> list[Path]:
    """Removes every file of a target's folder that none of ``wanted`` needs.

    Returns:
        What was removed.
    """
    needed = {each.path for each in wanted}
    needed |= {each.folder / f"{each.manifest.stem}.json" for each in wanted}
    others = [path for path in folder.glob("*") if path not in needed]
    for path in others:
        path.unlink()
    return others
