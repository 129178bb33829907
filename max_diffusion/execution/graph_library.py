"""Compiled graphs that are there already: where they are looked for, in which order."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from ..errors import CompileError, RequestError
from .artefacts import (
    Artefact,
    ArtefactError,
    artefacts_in,
    compiler_versions,
)
from .targets import HOSTS, targets_of

if TYPE_CHECKING:
    from max.driver import Device
    from max.engine import CompiledModel

    from .graph_module import GraphModule

logger = logging.getLogger(__name__)

# Of MAX's debugging, set in Python or by the environment: what makes it compile other
# code of the same graphs, or tell of compiling.
_DEBUGGING: Final = (
    "assert_level",
    "ir_output_dir",
    "nan_check",
    "op_log_level",
    "pre_jit",
    "uninitialized_read_check",
)


def shipped_graphs() -> Path:
    """Returns the folder of the compiled graphs that ship with the package."""
    return Path(__file__).parents[1] / "prebuilt_graphs"


@final
class GraphLibrary:
    """Finds compiled graphs in given folders, then in the package.

    They are machine code: no other folder is looked into, a model's least of all.

    Args:
        device: What they shall run on.
        folders: That :mod:`max_diffusion.exporting` has written to.
        is_required: Whether graphs that are not found are an error. Compiling them
            takes minutes.

    Raises:
        RequestError: There is no such folder.
    """

    def __init__(
        self,
        device: Device,
        folders: Sequence[str | os.PathLike[str]] = (),
        *,
        is_required: bool = False,
    ) -> None:
        self._given = [_checked(folder) for folder in folders]
        self._is_required = is_required
        self._targets = targets_of(device)

    @property
    def _folders(self) -> Sequence[Path]:
        return () if _debugging() else (*self._given, shipped_graphs())

    def by_recipe(self, name: str, recipe: str | None) -> Artefact | None:
        """Returns compiled graphs that were built of the same, or ``None``."""
        if recipe is None:
            return None
        found = self._find(name, lambda each: each.manifest.recipe == recipe)
        return found[0] if found else None

    def find(self, module: GraphModule) -> list[Artefact]:
        """Returns a module's compiled graphs, checked as far as can be without them.

        Returns:
            The best first; none where there seem to be some, but none can be used: a
            line of the log says why.

        Raises:
            CompileError: There are none, and they are required.
        """
        own = module.artefact
        key = module.key if own is None else own.manifest.key
        found = self._find(module.name, lambda each: each.manifest.key == key)
        names = module.graph_names
        good = [each for each in found if each.manifest.graphs == names]
        if not good:
            others = [f"{each.path} holds other graphs" for each in found]
            self._tell(module, others or self._problems(module))
        return good

    def read(
        self, artefacts: Sequence[Artefact], module: GraphModule
    ) -> CompiledModel | None:
        """Reads the best of what :meth:`find` has found.

        Returns:
            ``None`` where every file is damaged, of which a line of the log tells.

        Raises:
            CompileError: They are damaged, and compiled graphs are required.
        """
        problems: list[str] = []
        for artefact in artefacts:
            try:
                graphs = artefact.read()
            except ArtefactError as err:
                problems.append(str(err))
                continue
            for problem in problems:
                logger.warning(
                    "precompiled graphs: %s: %s; %s is used instead",
                    module.name,
                    problem,
                    artefact.path,
                )
            return graphs
        self._tell(module, problems)
        return None

    def _tell(self, module: GraphModule, problems: Sequence[str]) -> None:
        """Says what is wrong with compiled graphs, if anything is."""
        if self._is_required:
            reason = problems[0] if problems else "there are none"
            raise CompileError(
                f"precompiled graphs: {module.name}: {reason}; write them with "
                "max-diffusion compile, of this model, dtype, caches and processor, "
                "and give their folder"
            )
        if problems:
            logger.warning(
                "precompiled graphs: %s: %s; it is compiled here",
                module.name,
                problems[0],
            )

    def _find(self, name: str, is_wanted: Callable[[Artefact], bool]) -> list[Artefact]:
        return [
            found
            for folder in self._folders
            for target in self._targets
            for found in artefacts_in(folder / target.name, name)
            if found.manifest.target == target.name and is_wanted(found)
        ]

    def _problems(self, module: GraphModule) -> list[str]:
        """Why nothing was found of what seems to be there."""
        debugging = _debugging()
        if debugging:
            return [f"MAX's debugging has {', '.join(debugging)} set"]
        own = [target.name for target in self._targets]
        problems: list[str] = []
        foreign: list[str] = []
        for folder in self._folders:
            for name in _subfolders(folder):
                told = problems if name in own else foreign
                damaged: list[str] = []
                for found in artefacts_in(folder / name, module.name, damaged):
                    told += _difference(found, module, own)
                problems += damaged if name in own else ()
        problems += foreign
        if self._given and not problems:
            where = ", ".join(map(str, self._given))
            problems.append(f"{where} has none of this model, dtype and device")
        return problems


def _debugging() -> list[str]:
    """What is set of MAX's debugging that shipped code was compiled without."""
    from max.engine import InferenceSession

    debug = InferenceSession.debug
    return [name for name in _DEBUGGING if getattr(debug, name)]


def _checked(folder: str | os.PathLike[str]) -> Path:
    """A folder of compiled graphs that was given."""
    path = Path(folder)
    try:
        is_folder = path.is_dir()
        is_target = is_folder and any(path.glob("*.mef.xz"))
    except OSError as err:
        raise RequestError(
            f"precompiled: {path!s:.200} cannot be read ({err.strerror})"
        ) from err
    if not os.fspath(folder) or not is_folder:
        raise RequestError(
            f"precompiled: {os.fspath(folder)!r} is no folder; write one with "
            "max-diffusion compile MODEL --output DIR"
        )
    if is_target:
        raise RequestError(
            f"precompiled: {path} is a target's folder; give the one above it"
        )
    return path


def _difference(
    artefact: Artefact, module: GraphModule, own: Sequence[str]
) -> list[str]:
    """What is wrong with compiled graphs of the same module, if they are."""
    manifest, place = artefact.manifest, artefact.folder.name
    if manifest.subject != module.subject:
        return []  # another model's
    if manifest.target != place:
        return [f"{artefact.path} is for {manifest.target}, not for {place}"]
    if manifest.target not in own:
        has = f"is {own[0]}" if own else f"is none of {', '.join(HOSTS)}, or in doubt"
        return [f"they are for {manifest.target}, and this machine {has}"]
    versions = compiler_versions()
    if manifest.versions != versions:
        return [f"they are of {_listed(manifest.versions)}, not {_listed(versions)}"]
    return ["the graphs have been changed since"]


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []
